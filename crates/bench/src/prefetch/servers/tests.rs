use super::*;
use std::net::TcpListener;

/// What a query returns from a server that answers these messages after its greeting.
fn asked(answer: &'static [u8]) -> Outcome<u64> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let server = std::thread::spawn(move || {
        let (mut client, _) = listener.accept().unwrap();
        let mut greeting = [0; 41];
        client.read_exact(&mut greeting).unwrap();
        assert_eq!(greeting[..8], [0, 0, 0, 41, 0, 3, 0, 0], "length and version");
        client.write_all(b"R\0\0\0\x08\0\0\0\0Z\0\0\0\x05I").unwrap();
        let mut query = [0; 14];
        client.read_exact(&mut query).unwrap();
        assert_eq!(query, *b"Q\0\0\0\x0dSELECT 1\0");
        client.write_all(answer).unwrap();
    });
    let rows = Postgres::connect(address, LIMIT).and_then(|mut postgres| postgres.query("SELECT 1"));
    server.join().unwrap();
    rows
}

#[test]
fn rows_are_counted_until_the_server_is_ready() {
    assert_eq!(asked(b"D\0\0\0\x06\0\0D\0\0\0\x06\0\0C\0\0\0\x05\0Z\0\0\0\x05I").unwrap(), 2);
    let refused = asked(b"E\0\0\0\x0fSERROR\0M?\0\0Z\0\0\0\x05I").unwrap_err().to_string();
    assert!(refused.contains("SERROR M?"), "{refused}");
    assert!(asked(b"D\0\0\0\x06").is_err(), "it hung up in the middle");
    assert!(asked(b"D\0\0\0\x03").is_err(), "shorter than its own length");
}
