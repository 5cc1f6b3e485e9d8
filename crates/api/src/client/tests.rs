use super::Client;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;

#[test]
fn bytes_right_behind_an_upgrade_are_handed_over_and_the_stream_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let daemon = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            request.push(byte[0]);
        }
        // One write: the client reads the answer and what follows at once.
        stream
            .write_all(
                b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: offshoot-console\r\n\r\nlogin: ",
            )
            .unwrap();
        let mut typed = [0; 4];
        stream.read_exact(&mut typed).unwrap();
        stream.write_all(&typed).unwrap();
    });
    let mut upgraded = Client::new(&socket).unwrap().upgrade("/v1/vms/web/console").unwrap();
    assert_eq!(upgraded.early, b"login: ");
    upgraded.stream.write_all(b"root").unwrap();
    let mut echo = String::new();
    upgraded.stream.read_to_string(&mut echo).unwrap();
    assert_eq!(echo, "root");
    daemon.join().unwrap();
}
