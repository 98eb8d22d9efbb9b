//! A command in a container, against a server in this process.

use tokio::io::{DuplexStream, duplex};
use tokio::sync::mpsc::channel;

use super::*;

fn pod(name: &str, ready: &str, containers: &[&str]) -> Value {
    let containers: Vec<Value> = containers.iter().map(|name| json!({"name": name})).collect();
    json!({"metadata": {"name": name}, "spec": {"containers": containers}, "status": {
        "phase": "Running", "conditions": [{"type": "Ready", "status": ready}]}})
}

#[test]
fn the_container_that_is_meant_is_found_or_the_names_are_told() {
    let mut leaving = pod("web-0", "True", &["web"]);
    leaving["metadata"]["deletionTimestamp"] = "2026-11-27T10:00:00Z".into();
    let starting = pod("web-1", "False", &["web"]);
    let mut both = pod("web-2", "True", &["web", "proxy"]);
    both["spec"]["initContainers"] = json!([{"name": "mesh"}]);
    let mut pending = pod("web-3", "False", &["web"]);
    pending["status"]["phase"] = "Pending".into();
    let pods = [leaving.clone(), pending.clone(), starting.clone(), both];
    let found = |pods: &[Value], pod, container| {
        let target = choose(pods, pod, container)?;
        Ok::<_, Failure>(format!("{}/{}", target.pod, target.container))
    };
    for (pod, container, expected) in [
        (None, None, "web-2/web"),
        (None, Some("mesh"), "web-2/mesh"),
        (Some("web-1"), None, "web-1/web"),
        // whoever names it knows why
        (Some("web-0"), Some("web"), "web-0/web"),
    ] {
        assert_eq!(found(&pods, pod, container).unwrap(), expected);
    }
    let of_two = choose(&pods, None, None).unwrap();
    assert_eq!(of_two.chosen_of, ["web", "proxy"]);
    // a pod that is not ready is where somebody looks for the reason
    assert_eq!(found(&[leaving.clone(), starting], None, None).unwrap(), "web-1/web");
    for (pods, pod, container, exit, code, said) in [
        (&[leaving, pending][..], None, None, Exit::Problems, "NO_RUNNING_POD", ""),
        (&pods, Some("web-9"), None, Exit::Problems, "POD_GONE", "web-0, web-3, web-1, web-2"),
        (&[], Some("web-9"), None, Exit::Problems, "POD_GONE", ""),
        (&pods, None, Some("db"), Exit::Usage, "CONTAINER_UNKNOWN", "web, proxy, mesh"),
    ] {
        let refused = choose(pods, pod, container).unwrap_err();
        assert_eq!((refused.exit, refused.code.as_str()), (exit, code));
        assert!(refused.render().contains(said), "{}", refused.render());
    }
}

#[test]
fn a_command_stands_in_the_query_word_by_word() {
    let target = ExecTarget { pod: "web-1".into(), container: "web".into(), chosen_of: vec![] };
    let command = ["sh".to_owned(), "-c".to_owned(), "a && b=c".to_owned()];
    let path = |input, terminal| {
        ExecRequest { target: &target, command: &command, input, terminal }.path()
    };
    let words = "command=sh&command=-c&command=a+%26%26+b%3Dc";
    assert_eq!(
        path(false, false),
        format!("/pods/web-1/exec?container=web&stdout=true&stderr=true&{words}")
    );
    assert_eq!(
        path(true, true),
        format!("/pods/web-1/exec?container=web&stdin=true&stdout=true&tty=true&{words}")
    );
}

#[test]
fn a_status_says_how_a_command_has_ended() {
    let exit = |code: &str| {
        json!({"status": "Failure", "reason": "NonZeroExitCode", "message": "m",
            "details": {"causes": [{"reason": "Other"},
                {"reason": "ExitCode", "message": code}]}})
    };
    for (status, end) in [
        (json!({"metadata": {}, "status": "Success"}), ExecEnd::Succeeded),
        (exit("3"), ExecEnd::Exited(3)),
        (exit("x"), ExecEnd::Failed("m".into())),
        (
            json!({"status": "Failure", "reason": "InternalError", "message": "no \u{1b}[m"}),
            ExecEnd::Failed("no \\u{1b}[m".into()),
        ),
        (json!({}), ExecEnd::Failed("no reason given".into())),
    ] {
        assert_eq!(end_of(status.to_string().as_bytes()), end, "{status}");
    }
    assert_eq!(end_of(b"odd"), ExecEnd::Failed("odd".into()));
}

type Server = WebSocketStream<DuplexStream>;

/// Runs a session against `server`; gives its end, what it wrote, and what the server gives.
async fn session<T, F: Future<Output = T>>(
    (ends_input, input): (bool, &[u8]),
    size: Option<(u16, u16)>,
    server: impl FnOnce(Server) -> F,
) -> (ExecEnd, Vec<u8>, Vec<u8>, T) {
    let (near, far) = duplex(1 << 10);
    let session = ExecSession::new(near, ends_input, true).await;
    let far = WebSocketStream::from_raw_socket(far, Role::Server, None).await;
    let (sender, sizes) = channel(1);
    if let Some(size) = size {
        sender.send(size).await.unwrap();
    }
    let (mut output, mut errors) = (Vec::new(), Vec::new());
    let local =
        LocalStreams { input: Some(input), output: &mut output, errors: &mut errors, sizes };
    let (end, seen) = tokio::join!(session.run(local), server(far));
    (end, output, errors, seen)
}

async fn says(server: &mut Server, stream: u8, bytes: &[u8]) {
    server.send(Message::Binary(frame(stream, bytes))).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn streams_go_both_ways_and_do_not_wait_for_each_other() {
    // more than fits in between, while the input is not read
    let input = vec![b'i'; 100 << 10];
    let large = vec![b'o'; 100 << 10];
    let serve = |mut server: Server| async move {
        says(&mut server, OUTPUT, &large).await;
        says(&mut server, ERRORS, b"warned").await;
        says(&mut server, 9, b"unknown").await;
        says(&mut server, CLOSE, &[ERRORS]).await;
        let (mut read, mut sizes, mut ended) = (0, Vec::new(), false);
        while !ended || sizes.is_empty() {
            let Message::Binary(frame) = server.next().await.unwrap().unwrap() else {
                continue;
            };
            match (frame[0], &frame[1..]) {
                (INPUT, bytes) => read += bytes.len(),
                (RESIZE, size) => sizes = size.to_vec(),
                (CLOSE, [INPUT]) => ended = true,
                other => panic!("{other:?}"),
            }
        }
        let status = json!({"status": "Success"}).to_string();
        says(&mut server, STATUS, status.as_bytes()).await;
        server.close(None).await.unwrap();
        (read, String::from_utf8(sizes).unwrap())
    };
    let (end, output, errors, seen) = session((true, &input), Some((80, 24)), serve).await;
    assert_eq!((end, output.len(), &errors[..]), (ExecEnd::Succeeded, 100 << 10, &b"warned"[..]));
    assert_eq!(seen, (100 << 10, r#"{"Width":80,"Height":24}"#.to_owned()));
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_ends_first_is_no_end_of_the_command() {
    let (end, ..) = session((true, b""), None, |server| async { drop(server) }).await;
    assert!(matches!(end, ExecEnd::Cut(_)), "{end:?}");
    // v4 has no word for the end of the input; pings go on all the same
    let silent = |mut server: Server| async move {
        let first = server.next().await.unwrap().unwrap();
        tokio::time::sleep(SILENCE * 2).await;
        first
    };
    let (end, .., first) = session((false, b""), None, silent).await;
    assert_eq!(end, ExecEnd::Cut("nothing was heard for 60s".into()));
    assert!(first.is_ping(), "{first:?}");
}
