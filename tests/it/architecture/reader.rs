//! Which modules of the crate a source file names: its use trees, and the paths in its expressions
//! and types, followed through `crate`, `self`, `super`, child modules, and the names that a use
//! brings in. Comments, strings and test modules are left out.

use std::collections::{BTreeMap, BTreeSet};

/// Segments of a path, `crate` left out.
pub(super) type Module = Vec<String>;

/// A path of a use, and the name that it brings in.
type Import = (Module, String);

#[derive(Clone, Debug, PartialEq)]
enum Token {
    Word(String),
    /// `::`
    Into,
    Sign(char),
}

/// Where a string, a character or a comment that begins at `at` ends, if one does.
fn skipped(text: &[char], at: usize) -> Option<usize> {
    let is = |from: usize, what: &str| {
        what.chars().enumerate().all(|(n, c)| text.get(from + n) == Some(&c))
    };
    let find = |from: usize, what: &str| {
        (from..text.len()).find(|n| is(*n, what)).map_or(text.len(), |n| n + what.len())
    };
    match text[at] {
        '/' if is(at, "//") => Some(find(at, "\n")),
        '/' if is(at, "/*") => {
            let (mut depth, mut n) = (1, at + 2);
            while depth > 0 && n < text.len() {
                let (step, change) = if is(n, "/*") {
                    (2, 1)
                } else if is(n, "*/") {
                    (2, -1)
                } else {
                    (1, 0)
                };
                (n, depth) = (n + step, depth + change);
            }
            Some(n)
        }
        'r' => {
            let hashes = text[at + 1..].iter().take_while(|c| **c == '#').count();
            let raw = text.get(at + 1 + hashes) == Some(&'"');
            raw.then(|| find(at + 2 + hashes, &format!("\"{}", "#".repeat(hashes))))
        }
        '"' => {
            let mut n = at + 1;
            while n < text.len() && text[n] != '"' {
                n += if text[n] == '\\' { 2 } else { 1 };
            }
            Some(n + 1)
        }
        // a lifetime has no second quote
        '\'' if text.get(at + 1) == Some(&'\\') => Some(find(at + 3, "'")),
        '\'' if text.get(at + 2) == Some(&'\'') => Some(at + 3),
        _ => None,
    }
}

/// The tokens without `(in crate::room)` after `pub`: who may see an item is no use of that room.
fn tokens(text: &str) -> Vec<Token> {
    let mut found = all_tokens(text);
    let mut at = 0;
    while let Some(more) = found[at..]
        .windows(2)
        .position(|pair| pair[0] == Token::Word("pub".into()) && pair[1] == Token::Sign('('))
    {
        at += more + 1;
        let end = found[at..].iter().position(|token| *token == Token::Sign(')'));
        found.drain(at..=at + end.unwrap_or(0));
    }
    found
}

fn all_tokens(text: &str) -> Vec<Token> {
    let text: Vec<char> = text.chars().collect();
    let (mut found, mut at) = (Vec::new(), 0);
    while at < text.len() {
        if let Some(end) = skipped(&text, at) {
            at = end;
        } else if text[at].is_alphanumeric() || text[at] == '_' {
            let word: String =
                text[at..].iter().take_while(|c| c.is_alphanumeric() || **c == '_').collect();
            at += word.chars().count();
            // b"…", c"…", br"…": the letters belong to the string
            if !(["b", "c", "br", "cr"].contains(&word.as_str())
                && matches!(text.get(at), Some('"' | '\'' | '#')))
            {
                found.push(Token::Word(word));
            } else if text[at - 1] == 'r' {
                at -= 1;
            }
        } else if text[at] == ':' && text.get(at + 1) == Some(&':') {
            found.push(Token::Into);
            at += 2;
        } else {
            if !text[at].is_whitespace() {
                found.push(Token::Sign(text[at]));
            }
            at += 1;
        }
    }
    found
}

/// What stands outside of test modules.
fn without_tests(all: &[Token]) -> Vec<Token> {
    let mark = tokens("#[cfg(test)]");
    let (mut found, mut at) = (Vec::new(), 0);
    while at < all.len() {
        if !all[at..].starts_with(&mark) {
            found.push(all[at].clone());
            at += 1;
            continue;
        }
        // the item ends with a semicolon, or with the brace that closes its first one
        let mut depth = 0;
        at += mark.len();
        while at < all.len() {
            match all[at] {
                Token::Sign('{') => depth += 1,
                Token::Sign('}') => depth -= 1,
                _ => {}
            }
            at += 1;
            if depth == 0 && matches!(all[at - 1], Token::Sign(';' | '}')) {
                break;
            }
        }
    }
    found
}

/// The paths of the use tree that begins at `at`, each with the name that it brings in, and where
/// the tree ends.
fn tree(tokens: &[Token], mut at: usize, before: &[String], found: &mut Vec<Import>) -> usize {
    let mut path = before.to_vec();
    loop {
        match tokens.get(at) {
            Some(Token::Sign('{')) => {
                at += 1;
                while tokens.get(at).is_some_and(|t| *t != Token::Sign('}')) {
                    at = tree(tokens, at, &path, found);
                    at += usize::from(tokens.get(at) == Some(&Token::Sign(',')));
                }
                return at + 1;
            }
            Some(Token::Word(word)) => path.push(word.clone()),
            Some(Token::Into) => {}
            // `*` brings in everything
            Some(Token::Sign('*')) => {
                found.push((path, String::new()));
                return at + 1;
            }
            _ => return at,
        }
        at += 1;
        if matches!(tokens.get(at - 1), Some(Token::Word(_)))
            && tokens.get(at) != Some(&Token::Into)
        {
            let alias = matches!(tokens.get(at), Some(Token::Word(word)) if word == "as");
            let name = match tokens.get(at + 1) {
                Some(Token::Word(name)) if alias => name.clone(),
                // `self` at the end of a tree is the module itself
                _ => path.iter().rev().find(|s| *s != "self").cloned().unwrap_or_default(),
            };
            found.push((path, name));
            return at + if alias { 2 } else { 0 };
        }
    }
}

/// Every path of a file: those of its uses first, then those in expressions and types.
fn paths(tokens: &[Token]) -> (Vec<Import>, Vec<Module>) {
    let (mut uses, mut others, mut at) = (Vec::new(), Vec::new(), 0);
    while at < tokens.len() {
        match &tokens[at] {
            // `impl Trait + use<'a>` is no use
            Token::Word(word) if word == "use" && tokens.get(at + 1) != Some(&Token::Sign('<')) => {
                at = tree(tokens, at + 1, &[], &mut uses)
            }
            Token::Word(word) if at == 0 || tokens[at - 1] != Token::Into => {
                let mut path = vec![word.clone()];
                while let (Some(Token::Into), Some(Token::Word(next))) =
                    (tokens.get(at + 1), tokens.get(at + 2))
                {
                    path.push(next.clone());
                    at += 2;
                }
                others.push(path);
                at += 1;
            }
            _ => at += 1,
        }
    }
    (uses, others)
}

/// The module that a file is.
pub(super) fn module_of(file: &str) -> Module {
    let mut path: Module = file.trim_end_matches(".rs").split('/').map(str::to_owned).collect();
    if path.last().is_some_and(|name| ["mod", "lib", "main"].contains(&name.as_str())) {
        path.pop();
    }
    path
}

/// The modules that a file uses: the deepest that each path names. `modules` are those that there
/// are.
pub(super) fn used(module: &Module, text: &str, modules: &BTreeSet<Module>) -> BTreeSet<Module> {
    let (uses, mut others) = paths(&without_tests(&tokens(text)));
    let mut names: BTreeMap<&str, &Vec<String>> = BTreeMap::new();
    for (path, name) in &uses {
        names.insert(name, path);
    }
    let child = |name: &str| modules.contains(&[module.as_slice(), &[name.to_owned()]].concat());
    let mut found = BTreeSet::new();
    others.retain(|path| path.len() > 1);
    for path in uses.iter().map(|(path, _)| path).chain(&others) {
        let full = match names.get(path[0].as_str()) {
            // a name that a use brought in; in the use itself nothing stands before it
            Some(before) if before.len() > 1 && **before != *path => {
                [before.as_slice(), &path[1..]].concat()
            }
            _ => path.clone(),
        };
        let mut at = module.clone();
        let rest = match full[0].as_str() {
            "crate" => {
                at.clear();
                &full[1..]
            }
            "self" => &full[1..],
            "super" => {
                let up = full.iter().take_while(|s| *s == "super").count();
                at.truncate(at.len().saturating_sub(up));
                &full[up..]
            }
            name if child(name) => &full[..],
            _ => continue,
        };
        at.extend(rest.iter().filter(|s| *s != "self").cloned());
        while !at.is_empty() && !modules.contains(&at) {
            at.pop();
        }
        // what stands in the root of the crate is there for everybody
        if !at.is_empty() && at != *module {
            found.insert(at);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(file: &str, text: &str) -> Vec<String> {
        let files = ["a.rs", "a/b.rs", "a/b/c.rs", "a/b/d.rs", "e/mod.rs", "e/f.rs", "g.rs"];
        let modules = files.iter().map(|f| module_of(f)).collect();
        used(&module_of(file), text, &modules).into_iter().map(|m| m.join("/")).collect()
    }

    #[test]
    fn use_trees_are_read_whole() {
        assert_eq!(
            of("g.rs", "use crate::{a::{b::{c::X, d}, Y}, e::f as z};"),
            ["a", "a/b/c", "a/b/d", "e/f"]
        );
        assert_eq!(of("g.rs", "pub use crate::e::{self, f::*};"), ["e", "e/f"]);
        assert_eq!(
            of("a/b.rs", "use c::X; use self::d::Y; use super::Z; use std::a::b;"),
            ["a", "a/b/c", "a/b/d"]
        );
        assert_eq!(of("e/f.rs", "use super::super::a::b; use g::other;"), ["a/b"]);
        assert_eq!(of("a/b/c.rs", "use super::super::Z;"), ["a"]);
    }

    #[test]
    fn paths_in_expressions_and_types_count_too() {
        assert_eq!(
            of("g.rs", "fn f(x: crate::e::Thing) -> [u8; 2] { <crate::a::b::X as Y>::of(&x) }"),
            ["a/b", "e"]
        );
        assert_eq!(
            of("a/b/d.rs", "const X: u8 = super::super::super::g::Y; fn f() { super::c::run() }"),
            ["a/b/c", "g"]
        );
        assert_eq!(
            of("g.rs", "use crate::a; use crate::e as other; fn f() { a::b::run(other::f::X) }"),
            ["a", "a/b", "e", "e/f"]
        );
        assert_eq!(of("e/mod.rs", "mod f; fn g() { f::run() }"), ["e/f"]);
    }

    #[test]
    fn comments_strings_and_test_modules_do_not_count() {
        let text = r##"
            // crate::a
            /* crate::a /* crate::a */ crate::a */
            const X: &str = "crate::a \" crate::a"; const Y: &[u8] = br#"crate::a " crate::a"#; const Z: [char; 2] = ['"', '\''];
            fn f<'a>(x: &'a str) -> impl Sized + use<'a> { crate::g::run(x) }
            #[cfg(test)]
            pub(crate) mod tests { use crate::a; fn f() { { crate::a::x() } } }
            #[cfg(test)]
            mod more;
            fn last() { crate::e::f::run(b'"', c"crate::a") }
        "##;
        assert_eq!(of("a/b/c.rs", text), ["e/f", "g"]);
    }
}
