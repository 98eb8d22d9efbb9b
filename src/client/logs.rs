//! The logs of an application: all its containers at once, each followed until its pod is gone.

use std::time::Duration;

use jiff::Timestamp;
use reqwest::Response;
use serde_json::Value;
use tokio::sync::mpsc::Sender;
use tokio::time::sleep;

use super::api::Api;
use crate::base::error::{Exit, Failure};

/// Until a container that has ended, or is not there yet, is asked again.
const RETRY: Duration = Duration::from_secs(2);
/// A longer line is cut, bytes.
const MAX_LINE: usize = 64 << 10;

/// What is asked for.
#[derive(Clone, Debug, Default)]
pub struct LogOptions {
    pub follow: bool,
    /// Only until its container has ended: it does not start again.
    pub once: bool,
    /// Last lines of each container; all where it is not given.
    pub tail: Option<u32>,
    /// Only what is younger, seconds.
    pub since_s: Option<u64>,
}

/// A container whose log is read.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LogSource {
    pub pod: String,
    pub container: String,
    /// The pod, and its container where there are several.
    pub title: String,
}

/// What a log says, or why it says no more.
#[derive(Debug)]
pub enum LogLine {
    Said(String),
    /// There is no such pod any more.
    Gone(String),
    Failed(Failure),
}

/// The containers of pods.
pub fn sources(pods: &[Value]) -> Vec<LogSource> {
    let name = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let of_pod = |pod: &Value| -> Vec<LogSource> {
        let (pod_name, containers) =
            (name(&pod["metadata"]["name"]), pod["spec"]["containers"].as_array());
        let containers: Vec<String> =
            containers.into_iter().flatten().map(|c| name(&c["name"])).collect();
        let several = containers.len() > 1;
        let source = |container: String| LogSource {
            title: if several { format!("{pod_name}/{container}") } else { pod_name.clone() },
            pod: pod_name.clone(),
            container,
        };
        containers.into_iter().map(source).collect()
    };
    pods.iter().flat_map(of_pod).collect()
}

/// Sends the lines of one container, with its number, until there are no more. Where it is
/// followed, a connection that breaks and a container that starts again go on after the last line.
pub async fn read(
    api: Api,
    base: String,
    source: LogSource,
    options: LogOptions,
    (number, lines): (usize, Sender<(usize, LogLine)>),
) {
    let mut place = Place::default();
    loop {
        place.reconnect();
        let path =
            format!("{base}/pods/{}/log?{}", source.pod, query(&source, &options, place.last));
        let ended = match api.open(&path, None).await {
            Ok(Some(stream)) => pass_on(&api, stream, &mut place, &options, (number, &lines)).await,
            Ok(None) => Ended::Gone,
            Err(failure) => Ended::Failed(failure),
        };
        let last = match ended {
            Ended::Unheard => return,
            Ended::Whole if !options.follow || options.once => return,
            Ended::Whole => None,
            // not started yet, or the way is not there at the moment
            Ended::Failed(failure) if options.follow && failure.exit != Exit::Refused => None,
            Ended::Failed(failure) => Some(LogLine::Failed(of_source(failure, &source))),
            Ended::Gone => Some(LogLine::Gone(format!("{}: the pod is gone", source.title))),
        };
        if let Some(last) = last {
            let _ = lines.send((number, last)).await;
            return;
        }
        sleep(RETRY).await;
    }
}

/// How the reading of a log has ended.
enum Ended {
    /// The container has ended, or has said no more so far.
    Whole,
    /// There is no such pod any more.
    Gone,
    Failed(Failure),
    /// Nobody listens any more.
    Unheard,
}

/// Sends the lines of one connection.
async fn pass_on(
    api: &Api,
    mut stream: Response,
    place: &mut Place,
    options: &LogOptions,
    (number, lines): (usize, &Sender<(usize, LogLine)>),
) -> Ended {
    let mut rest = Vec::new();
    loop {
        let (piece, ended) = match stream.chunk().await {
            Ok(Some(piece)) => (Some(piece), None),
            Ok(None) => (None, Some(Ended::Whole)),
            Err(error) => (None, Some(Ended::Failed(api.unreachable(&error)))),
        };
        rest.extend_from_slice(&piece.unwrap_or_default());
        // half a line that was cut comes again, whole
        let is_last = match ended {
            Some(Ended::Whole) => true,
            Some(_) => !options.follow,
            None => false,
        };
        if is_last && !rest.is_empty() {
            rest.push(b'\n');
        }
        for line in whole_lines(&mut rest) {
            let Some(said) = place.fresh(&line) else { continue };
            if lines.send((number, LogLine::Said(said.to_owned()))).await.is_err() {
                return Ended::Unheard;
            }
        }
        if let Some(ended) = ended {
            return ended;
        }
    }
}

/// A failure with the container that it is of. What a kubelet calls a bad request is a container
/// that has no log yet, and no wrong use of a command.
fn of_source(mut failure: Failure, source: &LogSource) -> Failure {
    failure.what = format!("{}: {}", source.title, failure.what);
    if failure.exit == Exit::Usage {
        failure.exit = Exit::Problems;
    }
    failure
}

fn query(source: &LogSource, options: &LogOptions, last: Option<Timestamp>) -> String {
    let mut query =
        format!("container={}&timestamps=true&follow={}", source.container, options.follow);
    if let Some(last) = last {
        query.push_str(&format!("&sinceTime={last}"));
        return query;
    }
    if let Some(tail) = options.tail {
        query.push_str(&format!("&tailLines={tail}"));
    }
    if let Some(since) = options.since_s {
        query.push_str(&format!("&sinceSeconds={since}"));
    }
    query
}

/// Takes the lines that are whole; what is too long for one counts as one.
fn whole_lines(rest: &mut Vec<u8>) -> Vec<String> {
    let end = match rest.iter().rposition(|b| *b == b'\n') {
        Some(at) => at + 1,
        None if rest.len() > MAX_LINE => rest.len(),
        None => return Vec::new(),
    };
    let whole: Vec<u8> = rest.drain(..end).collect();
    String::from_utf8_lossy(&whole).lines().map(str::to_owned).collect()
}

/// How far a log is read.
#[derive(Default)]
struct Place {
    /// Time of the newest line.
    last: Option<Timestamp>,
    /// What this connection repeats of the one before is not newer.
    repeated: Option<Timestamp>,
}

impl Place {
    /// The next connection begins: `sinceTime` counts whole seconds, so it repeats some lines.
    fn reconnect(&mut self) {
        self.repeated = self.last;
    }

    /// A line without the time that the kubelet puts before it; none if it was read before. Within
    /// one connection all lines count, also of one time, or of a clock that was set back.
    fn fresh<'a>(&mut self, line: &'a str) -> Option<&'a str> {
        let (time, said) = line.split_once(' ').unwrap_or((line, ""));
        let Ok(time) = time.parse::<Timestamp>() else { return Some(line) };
        if self.repeated.is_some_and(|repeated| time <= repeated) {
            return None;
        }
        self.repeated = None;
        self.last = self.last.max(Some(time));
        Some(said)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_line_is_told_once_however_often_it_is_read() {
        let mut place = Place::default();
        let (first, second) = ("2026-11-27T10:00:00.000000001Z a b", "2026-11-27T10:00:01Z ");
        assert_eq!(place.fresh(first), Some("a b"));
        assert_eq!(place.fresh(second), Some(""));
        place.reconnect();
        assert_eq!(place.fresh(first), None);
        assert_eq!(place.fresh(second), None);
        assert_eq!(place.fresh("unable to retrieve"), Some("unable to retrieve"));
        let last = place.last;
        let source = LogSource { pod: "p".into(), container: "c".into(), title: "p".into() };
        let options = LogOptions { follow: true, tail: Some(5), ..LogOptions::default() };
        assert_eq!(
            query(&source, &options, None),
            "container=c&timestamps=true&follow=true&tailLines=5"
        );
        let again = query(&source, &options, last);
        assert!(again.ends_with("follow=true&sinceTime=2026-11-27T10:00:01Z"), "{again}");
    }

    #[test]
    fn a_connection_tells_all_lines_whatever_their_times_are() {
        let mut place = Place::default();
        // two of one time, a clock that is set back
        let lines = ["2026-11-27T10:00:02Z a", "2026-11-27T10:00:02Z b", "2026-11-27T10:00:00Z c"];
        for line in lines {
            assert_eq!(place.fresh(line), line.get(21..));
        }
        // the next one repeats them all, and then goes on whatever the clock says
        place.reconnect();
        for line in lines {
            assert_eq!(place.fresh(line), None);
        }
        assert_eq!(place.fresh("2026-11-27T10:00:03Z d"), Some("d"));
        assert_eq!(place.fresh("2026-11-27T10:00:01Z e"), Some("e"));
        let newest = "2026-11-27T10:00:03Z".parse::<Timestamp>().ok();
        assert_eq!(place.last, newest);
    }

    #[test]
    fn a_failure_names_its_container() {
        let source = LogSource { pod: "p".into(), container: "c".into(), title: "p/c".into() };
        let waits = Failure::usage("REMOTE_REFUSES", "waiting to start");
        let told = of_source(waits, &source);
        assert_eq!((told.exit, told.what.as_str()), (Exit::Problems, "p/c: waiting to start"));
        let refused = Failure::new(Exit::Refused, "TOKEN_UNKNOWN", "no");
        assert_eq!(of_source(refused, &source).exit, Exit::Refused);
    }

    #[test]
    fn lines_are_whole_wherever_the_stream_is_cut() {
        let text = "one\ntwo ü\n\nthree";
        for size in 1..text.len() {
            let (mut rest, mut found) = (Vec::new(), Vec::new());
            for piece in text.as_bytes().chunks(size) {
                rest.extend_from_slice(piece);
                found.extend(whole_lines(&mut rest));
            }
            assert_eq!(
                (&found[..], &rest[..]),
                (&["one", "two ü", ""].map(String::from)[..], &b"three"[..])
            );
        }
        assert_eq!(whole_lines(&mut vec![b'x'; MAX_LINE + 1]).len(), 1);
    }

    #[test]
    fn a_source_is_named_after_its_pod() {
        let pod = |name: &str, containers: &[&str]| {
            let containers: Vec<Value> = containers.iter().map(|c| json!({"name": c})).collect();
            json!({"metadata": {"name": name}, "spec": {"containers": containers}})
        };
        let found = sources(&[pod("a", &["web"]), pod("b", &["web", "proxy"])]);
        let titles: Vec<&str> = found.iter().map(|source| source.title.as_str()).collect();
        assert_eq!(titles, ["a", "b/web", "b/proxy"]);
    }
}
