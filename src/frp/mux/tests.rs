//! Frames as fatedier/yamux writes and expects them, and the hazards of other implementations, each
//! as a test.

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};

use super::*;

fn bytes(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}

/// A session with a raw peer at the other end.
fn raw(side: Side, window: u32) -> (Mux, DuplexStream, tokio::task::JoinHandle<CloseReason>) {
    let (ours, theirs) = tokio::io::duplex(1024 * 1024);
    let (mux, driver) = Mux::new(ours, side, Limits { window, streams: 16 });
    (mux, theirs, tokio::spawn(driver.run()))
}

fn pair() -> (Mux, Mux) {
    let (a, b) = tokio::io::duplex(64 * 1024);
    let (client, one) = Mux::new(a, Side::Client, Limits::default());
    let (server, two) = Mux::new(b, Side::Server, Limits::default());
    tokio::spawn(one.run());
    tokio::spawn(two.run());
    (client, server)
}

async fn expect(peer: &mut DuplexStream, text: &str) {
    let expected = bytes(text);
    let mut got = vec![0; expected.len()];
    tokio::time::timeout(Duration::from_secs(5), peer.read_exact(&mut got))
        .await
        .expect("frames in time")
        .unwrap();
    assert_eq!(got, expected, "got {got:02x?}");
}

#[tokio::test]
async fn a_stream_is_announced_at_once_with_the_window_beyond_the_first() {
    let (mux, mut peer, _task) = raw(Side::Client, 6 * 1024 * 1024);
    let _stream = mux.open().await.unwrap();
    expect(&mut peer, "00 01 0001 00000001 005c0000").await;
    let _second = mux.open().await.unwrap();
    expect(&mut peer, "00 01 0001 00000003 005c0000").await;
}

#[tokio::test]
async fn an_incoming_stream_is_acknowledged_before_anything_is_written() {
    let (mux, mut peer, _task) = raw(Side::Server, 6 * 1024 * 1024);
    peer.write_all(&bytes("00 01 0001 00000001 005c0000")).await.unwrap();
    expect(&mut peer, "00 01 0002 00000001 005c0000").await;
    // SYN on a data frame is as good
    peer.write_all(&bytes("00 00 0001 00000003 00000002 6869")).await.unwrap();
    expect(&mut peer, "00 01 0002 00000003 005c0000").await;
    mux.accept().await.unwrap();
    let mut second = mux.accept().await.unwrap();
    let mut text = [0; 2];
    second.read_exact(&mut text).await.unwrap();
    assert_eq!(&text, b"hi");
}

#[tokio::test]
async fn pings_are_answered_and_fin_is_sent_once() {
    let (mux, mut peer, _task) = raw(Side::Client, FIRST_WINDOW);
    peer.write_all(&bytes("00 02 0001 00000000 deadbeef")).await.unwrap();
    expect(&mut peer, "00 02 0002 00000000 deadbeef").await;
    let mut stream = mux.open().await.unwrap();
    expect(&mut peer, "00 01 0001 00000001 00000000").await;
    stream.write_all(b"abc").await.unwrap();
    stream.shutdown().await.unwrap();
    stream.shutdown().await.unwrap();
    drop(stream);
    expect(&mut peer, "00 00 0000 00000001 00000003 616263 00 01 0004 00000001 00000000").await;
    peer.write_all(&bytes("00 01 0004 00000001 00000000 00 02 0001 00000000 00000007"))
        .await
        .unwrap();
    // nothing between: no second FIN, no reset
    expect(&mut peer, "00 02 0002 00000000 00000007").await;
    assert_eq!(mux.open_streams(), 0);
}

#[tokio::test]
async fn what_was_written_before_a_drop_arrives() {
    let (client, server) = pair();
    let mut stream = client.open().await.unwrap();
    let sent = vec![7; 100_000];
    let copy = sent.clone();
    tokio::spawn(async move { stream.write_all(&copy).await.unwrap() });
    let mut got = Vec::new();
    server.accept().await.unwrap().read_to_end(&mut got).await.unwrap();
    assert!(got == sent);
}

/// A user on a slow line needs minutes for what lies in the windows before the last of it can be
/// sent.
#[tokio::test(start_paused = true)]
async fn a_slow_reader_gets_the_end_of_what_was_written_before_a_drop() {
    let (client, server) = pair();
    let mut stream = client.open().await.unwrap();
    let mut slow = server.accept().await.unwrap();
    let whole = Limits::default().window as usize + MAX_OUTBOX - 1;
    stream.write_all(&vec![7; whole]).await.unwrap();
    drop(stream);
    tokio::time::sleep(Duration::from_secs(300)).await;
    let mut got = Vec::new();
    slow.read_to_end(&mut got).await.unwrap();
    assert_eq!(got.len(), whole);
    drop(slow);
    // one who never reads at all is not waited for without end
    let mut stream = client.open().await.unwrap();
    let never = server.accept().await.unwrap();
    stream.write_all(&vec![7; whole]).await.unwrap();
    drop(stream);
    tokio::time::sleep(CLOSE_TIMEOUT_UNSENT + CLOSE_TIMEOUT).await;
    assert_eq!(client.open_streams(), 0);
    drop(never);
}

#[tokio::test]
async fn breaches_of_the_protocol_end_the_session_and_say_which() {
    for (frames, why) in [
        ("01 00 0000 00000000 00000000", "version"),
        ("00 07 0000 00000000 00000000", "unknown frame"),
        ("00 01 0001 00000002 00000000", "not free"),
        ("00 01 0001 00000001 00000000 00 01 0001 00000001 00000000", "not free"),
        ("00 01 0001 00000001 00000000 00 00 0000 00000001 00040001", "window"),
        ("00 00 0001 00000001 ffffffff", "window"),
    ] {
        let (_mux, mut peer, task) = raw(Side::Server, FIRST_WINDOW);
        peer.write_all(&bytes(frames)).await.unwrap();
        let end = task.await.unwrap();
        assert!(
            matches!(&end, CloseReason::Protocol(text) if text.contains(why)),
            "{frames}: {end:?}"
        );
    }
    let (_mux, mut peer, task) = raw(Side::Server, FIRST_WINDOW);
    peer.write_all(&bytes("00 03 0000 00000000 00000000")).await.unwrap();
    assert_eq!(task.await.unwrap(), CloseReason::GoAway);
    let (mux, peer, task) = raw(Side::Client, FIRST_WINDOW);
    drop(peer);
    assert_ne!(task.await.unwrap(), CloseReason::Local);
    assert!(mux.open().await.is_err() && mux.accept().await.is_none());
}

#[tokio::test]
async fn frames_of_unknown_streams_are_passed_over() {
    let (_mux, mut peer, _task) = raw(Side::Client, FIRST_WINDOW);
    let frames = "00 00 0000 00000009 00000003 616263 00 01 0004 00000009 00000000 \
                  00 02 0001 00000000 00000001";
    peer.write_all(&bytes(frames)).await.unwrap();
    expect(&mut peer, "00 02 0002 00000000 00000001").await;
}

#[tokio::test]
async fn after_the_peers_end_writing_fails_and_what_came_is_still_read() {
    let (mux, mut peer, _task) = raw(Side::Client, FIRST_WINDOW);
    let mut stream = mux.open().await.unwrap();
    peer.write_all(&bytes("00 00 0004 00000001 00000002 6f6b")).await.unwrap();
    let mut got = Vec::new();
    stream.read_to_end(&mut got).await.unwrap();
    assert_eq!(got, b"ok");
    assert_eq!(stream.write(b"x").await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    // a reset discards
    let mut second = mux.open().await.unwrap();
    peer.write_all(&bytes("00 00 0008 00000003 00000002 6f6b")).await.unwrap();
    assert_eq!(second.read(&mut [0; 8]).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn a_reader_that_does_not_read_stops_nobody_else() {
    let (client, server) = pair();
    let mut stuck = client.open().await.unwrap();
    let _unread = server.accept().await.unwrap();
    let writer = tokio::spawn(async move { stuck.write_all(&vec![0; 8 * 1024 * 1024]).await });
    for n in 0..200_u32 {
        let mut stream = client.open().await.unwrap();
        stream.write_all(&n.to_be_bytes()).await.unwrap();
        let mut other = server.accept().await.unwrap();
        let mut got = [0; 4];
        other.read_exact(&mut got).await.unwrap();
        other.write_all(&got).await.unwrap();
        stream.read_exact(&mut got).await.unwrap();
        assert_eq!(u32::from_be_bytes(got), n);
    }
    assert!(!writer.is_finished());
}

#[tokio::test]
async fn two_thousand_streams_echo_at_once_and_none_is_left() {
    let (client, server) = pair();
    tokio::spawn(async move {
        while let Some(mut stream) = server.accept().await {
            tokio::spawn(async move {
                let mut buffer = vec![0; 4096];
                while let Ok(n @ 1..) = stream.read(&mut buffer).await {
                    if stream.write_all(&buffer[..n]).await.is_err() {
                        break;
                    }
                }
            });
        }
    });
    let mut users = tokio::task::JoinSet::new();
    for n in 0..2000_u32 {
        let client = client.clone();
        users.spawn(async move {
            let mut stream = client.open().await.unwrap();
            let sent: Vec<u8> =
                (0..5000_u32).map(|i| u8::try_from((i + n) % 251).unwrap()).collect();
            for half in sent.chunks(2500) {
                stream.write_all(half).await.unwrap();
                let mut got = vec![0; half.len()];
                stream.read_exact(&mut got).await.unwrap();
                assert!(got == half);
            }
        });
    }
    while let Some(done) = users.join_next().await {
        done.unwrap();
    }
    for _ in 0..500 {
        if client.open_streams() == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{} streams are left", client.open_streams());
}

#[tokio::test]
async fn bulk_goes_through_in_both_directions_at_once() {
    let (client, server) = pair();
    let mut a = client.open().await.unwrap();
    let mut b = server.accept().await.unwrap();
    let sent: Vec<u8> = (0..16_000_000_u32).map(|i| (i % 249) as u8).collect();
    let (copy, other) = (sent.clone(), sent.clone());
    let echo = tokio::spawn(async move {
        let (mut r, mut w) = tokio::io::split(&mut b);
        let mut got = vec![0; copy.len()];
        let (read, wrote) = tokio::join!(r.read_exact(&mut got), w.write_all(&copy));
        read.unwrap();
        wrote.unwrap();
        assert!(got == copy);
        b
    });
    let (mut r, mut w) = tokio::io::split(&mut a);
    let mut got = vec![0; sent.len()];
    let (read, wrote) = tokio::join!(r.read_exact(&mut got), w.write_all(&other));
    read.unwrap();
    wrote.unwrap();
    assert!(got == sent);
    echo.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_silent_peer_is_pinged_and_then_given_up() {
    let (_mux, mut peer, task) = raw(Side::Server, FIRST_WINDOW);
    expect_slowly(&mut peer).await;
    assert_eq!(task.await.unwrap(), CloseReason::Silent);
}

async fn expect_slowly(peer: &mut DuplexStream) {
    let mut got = [0; 12];
    peer.read_exact(&mut got).await.unwrap();
    assert_eq!(got[..4], [0, 2, 0, 1]);
}

#[tokio::test]
async fn what_nobody_reads_is_not_kept_when_both_ends_are_gone() {
    // whichever end goes first
    for ours_first in [true, false] {
        let (client, server) = pair();
        let mut stream = client.open().await.unwrap();
        let mut other = server.accept().await.unwrap();
        // more than the window: the rest waits in the stream
        let filled = tokio::time::timeout(
            Duration::from_millis(200),
            stream.write_all(&vec![0; 8 * 1024 * 1024]),
        )
        .await;
        assert!(filled.is_err());
        other.read_exact(&mut [0; 10]).await.unwrap();
        if ours_first {
            drop(stream);
            tokio::task::yield_now().await;
            drop(other);
        } else {
            drop(other);
            let broken = |e: io::Error| e.kind() == io::ErrorKind::BrokenPipe;
            loop {
                let written = stream.write(b"x");
                let written = tokio::time::timeout(Duration::from_secs(5), written).await.unwrap();
                if written.is_err_and(broken) {
                    break;
                }
            }
            drop(stream);
        }
        let gone = async {
            while client.open_streams() + server.open_streams() > 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(5), gone)
            .await
            .expect("both ends forget the stream");
    }
}
