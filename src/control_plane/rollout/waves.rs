//! The waves of a rollout: how many clusters at a time.

use crate::base::text::printable;

/// Sizes of the waves that `text` names, over `total` clusters. What it leaves over is one more; a
/// wave that finds no cluster left is none.
///
/// # Errors
/// Why these are no waves, quoting the part.
pub fn sizes(text: &str, total: usize) -> Result<Vec<usize>, String> {
    let (mut sizes, mut left, mut is_all) = (Vec::new(), total, false);
    for part in text.split(',').map(str::trim) {
        let wrong = |why: &str| {
            let part: String = printable(part).chars().take(40).collect();
            format!("`{part}`: {why}")
        };
        if is_all {
            return Err(wrong("nothing is left after `all`"));
        }
        is_all = part == "all";
        let number = part.strip_suffix('%').unwrap_or(part);
        let number = Some(number).filter(|n| n.bytes().all(|b| b.is_ascii_digit()));
        let number: Option<usize> = number.and_then(|n| n.parse().ok()).filter(|n| *n > 0);
        let size = match (number, part.ends_with('%')) {
            _ if is_all => left,
            (Some(percent @ 1..=100), true) => (total * percent).div_ceil(100),
            (Some(count), false) => count,
            _ => return Err(wrong("a wave is a number of clusters, a part such as 10%, or all")),
        };
        sizes.push(size.min(left));
        left -= size.min(left);
    }
    sizes.push(left);
    sizes.retain(|size| *size > 0);
    Ok(sizes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waves_are_so_many_more_clusters_each() {
        for (text, total, expected) in [
            ("all", 200, &[200][..]),
            ("1,10%,all", 200, &[1, 20, 179]),
            ("1, 10% ,all", 5, &[1, 1, 3]),
            ("1,10%,all", 1, &[1]),
            ("1,10%,all", 2, &[1, 1]),
            ("1", 3, &[1, 2]),
            ("100%", 3, &[3]),
            ("50%,50%", 3, &[2, 1]),
            ("33%", 3, &[1, 2]),
            ("5000", 3, &[3]),
            ("1,1,1,1,all", 2, &[1, 1]),
        ] {
            assert_eq!(sizes(text, total).unwrap(), expected, "{text} of {total}");
        }
    }

    #[test]
    fn what_is_no_wave_is_quoted() {
        for (text, part) in [
            ("", "``"),
            ("1,", "``"),
            (",all", "``"),
            ("0", "`0`"),
            ("1,0%", "`0%`"),
            ("101%", "`101%`"),
            ("all,1", "`1`"),
            ("all,all", "`all`"),
            ("-1", "`-1`"),
            ("+1", "`+1`"),
            ("1.5", "`1.5`"),
            ("ten", "`ten`"),
            ("%", "`%`"),
            ("10%%", "`10%%`"),
            ("99999999999999999999999", "`99999999999999999999999`"),
        ] {
            let why = sizes(text, 10).unwrap_err();
            assert!(why.starts_with(part), "{text}: {why}");
        }
    }
}
