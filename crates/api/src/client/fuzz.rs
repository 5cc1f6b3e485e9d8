//! What a daemon may answer, edited at random: a request ends with a result, a refusal, or a word on what makes no
//! sense, and never without an end.

use super::{Client, ClientError};
use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixListener;
use std::path::Path;

fn answer(status: &str, headers: &str, body: &str) -> Vec<u8> {
    format!("HTTP/1.1 {status}\r\ncontent-type: application/json\r\n{headers}\r\n{body}").into_bytes()
}

fn sized(status: &str, body: &str) -> Vec<u8> {
    answer(status, &format!("content-length: {}\r\n", body.len()), body)
}

fn answers() -> Vec<Vec<u8>> {
    let lines = [
        r#"{"progress": {"step": "storing", "done": 1, "total": 9}}"#,
        r#"{"progress": {"step": "storing", "done": 9, "total": 9}}"#,
        r#"{"result": [1, 2, 3]}"#,
    ];
    let chunks: String = lines.iter().map(|line| format!("{:x}\r\n{line}\n\r\n", line.len() + 1)).collect();
    vec![
        answer("200 OK", "transfer-encoding: chunked\r\n", &format!("{chunks}0\r\n\r\n")),
        sized("200 OK", r#"{"result": [7]}"#),
        sized("404 Not Found", r#"{"kind": "not_found", "message": "no VM is named web"}"#),
    ]
}

/// Sends a request to a daemon that says `words` whatever it is asked, and then nothing more.
fn asked<T>(words: &[u8], ask: impl FnOnce(&Client) -> Result<T, ClientError>) -> Result<T, ClientError> {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("sock");
    let listener = UnixListener::bind(&socket).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.write_all(words).and_then(|()| stream.shutdown(Shutdown::Write));
            let _ = stream.read_to_end(&mut Vec::new());
        });
        ask(&client(&socket))
    })
}

fn client(socket: &Path) -> Client {
    Client::new(socket).unwrap()
}

#[test]
fn answers_of_daemons() {
    fuzz!(answers(), |words, long| {
        let mut steps = 0;
        let done = if long {
            asked(words, |client| client.post_long::<Vec<u32>>("/v1/vms/web/fork", &(), |_| steps += 1))
        } else {
            asked(words, |client| client.get::<serde_json::Value>("/v1/vms")).map(|_| Vec::new())
        };
        assert!(steps <= words.len() / 20, "{steps} steps in {} bytes", words.len());
        if let Err(error) = done {
            assert!(!error.to_string().is_empty());
        }
    });
    let whole = answers();
    let long = |words: &[u8]| asked(words, |client| client.post_long::<Vec<u32>>("/x", &(), |_| ()));
    assert_eq!(long(&whole[0]).unwrap(), [1, 2, 3]);
    assert_eq!(long(&whole[1]).unwrap(), [7]);
    assert!(matches!(long(&whole[2]), Err(ClientError::Refused(body)) if body.message == "no VM is named web"));
}
