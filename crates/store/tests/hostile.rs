//! Servers and ways to them that do not behave: conditions ignored, errors, slowness, silence, bodies cut short.
//! Whatever comes, it is reported by name within a bounded number of requests, and never a wrong byte is served.

use crate::common;
use crate::weed;

use common::{Mem, Rng, assert_same, assert_sound, manifest, publish, read_all};
use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use store::engine::object::Limits;
use store::engine::{Circuit, Engine, S3};
use store::{Error, Expect, Mode, Store};

/// What the front does with a request.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Manner {
    Honest,
    /// Answers this status without asking the server.
    Status(u16),
    /// Lets the server do it, then answers this status: the answer is lost.
    DoneBut(u16),
    /// Never answers.
    Silent,
    /// Answers a byte now and then.
    Drip,
    /// Closes the connection in the middle of the body.
    CutShort,
    /// Says that the body is shorter than it is, and leaves the rest out.
    Shorter,
    /// Flips a bit of the body.
    Flip,
    /// Closes the connection.
    Close,
}

#[derive(Default)]
struct Plan {
    manner: Option<Manner>,
    /// Requests left that it is done to; the others pass.
    left: u32,
    /// Only requests whose first line contains it.
    only: String,
}

/// Content, number of the put, and the mark it came with.
type Kept = (Vec<u8>, u32, String);

/// A front on a port of its own.
struct Front {
    endpoint: String,
    plan: Arc<Mutex<Plan>>,
    requests: Arc<AtomicU32>,
    over: Arc<AtomicBool>,
}

impl Drop for Front {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

impl Front {
    fn serve(handle: impl Fn(&mut TcpStream, Request, Manner) -> io::Result<()> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let front = Self {
            endpoint: format!("http://{}", listener.local_addr().unwrap()),
            plan: Arc::default(),
            requests: Arc::default(),
            over: Arc::default(),
        };
        let (plan, requests, over) = (Arc::clone(&front.plan), Arc::clone(&front.requests), Arc::clone(&front.over));
        let handle = Arc::new(handle);
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let Ok(mut client) = client else { return };
                let (plan, requests, over, handle) =
                    (Arc::clone(&plan), Arc::clone(&requests), Arc::clone(&over), Arc::clone(&handle));
                std::thread::spawn(move || {
                    client.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
                    let Ok(Some(request)) = Request::read(&mut client) else { return };
                    requests.fetch_add(1, Ordering::Relaxed);
                    let manner = {
                        let mut plan = plan.lock().unwrap();
                        match plan.manner {
                            Some(manner) if plan.left > 0 && request.head.contains(&plan.only) => {
                                plan.left -= 1;
                                manner
                            }
                            _ => Manner::Honest,
                        }
                    };
                    if manner == Manner::Silent {
                        while !over.load(Ordering::Relaxed) {
                            std::thread::sleep(Duration::from_millis(50));
                        }
                        return;
                    }
                    let _ = handle(&mut client, request, manner);
                    let _ = client.shutdown(Shutdown::Both);
                });
            }
        });
        front
    }

    /// A front before the real server.
    fn before_weed() -> Self {
        let port = weed::weed().port;
        Self::serve(move |client, request, manner| {
            match manner {
                Manner::Status(status) => return answer(client, status, "", b"<Error>no</Error>"),
                Manner::Close => return Ok(()),
                _ => {}
            }
            let (head, body) = request.forward(port)?;
            let no_body = request.head.starts_with("HEAD") || body.is_empty();
            match manner {
                Manner::DoneBut(status) => answer(client, status, "", b"<Error>lost</Error>"),
                Manner::CutShort if !no_body => {
                    client.write_all(head.as_bytes())?;
                    client.write_all(&body[..body.len() / 2])
                }
                Manner::Drip => {
                    for byte in head.bytes().take(200) {
                        client.write_all(&[byte])?;
                        std::thread::sleep(Duration::from_millis(100));
                    }
                    Ok(())
                }
                Manner::Shorter if !no_body => {
                    let less = body.len() - 1;
                    let head =
                        head.replace(&format!("Content-Length: {}", body.len()), &format!("Content-Length: {less}"));
                    client.write_all(head.as_bytes())?;
                    client.write_all(&body[..less])
                }
                Manner::Flip if !no_body => {
                    let mut body = body;
                    let middle = body.len() / 2;
                    body[middle] ^= 4;
                    client.write_all(head.as_bytes())?;
                    client.write_all(&body)
                }
                _ => {
                    client.write_all(head.as_bytes())?;
                    client.write_all(&body)
                }
            }
        })
    }

    /// A server that stores and gives, but looks at no condition of the kinds named.
    fn that_ignores(headers: &'static [&'static str]) -> Self {
        let objects: Mutex<HashMap<String, Kept>> = Mutex::default();
        let puts = AtomicU32::new(0);
        Self::serve(move |client, request, _| {
            let mut objects = objects.lock().unwrap();
            let mut words = request.head.split_whitespace();
            let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default().to_owned());
            let etag =
                |number: u32| format!("ETag: \"{number:032x}\"\r\nLast-Modified: Sat, 01 Jan 2022 00:00:00 GMT\r\n");
            match method {
                "PUT" => {
                    let there = objects.get(&path).map(|(_, number, _)| format!("\"{number:032x}\""));
                    let condition = |name: &str| request.header(name).filter(|_| !headers.contains(&name));
                    if condition("if-none-match").is_some() && there.is_some()
                        || condition("if-match").is_some_and(|wanted| Some(wanted) != there.as_deref())
                    {
                        return answer(client, 412, "", b"");
                    }
                    let number = puts.fetch_add(1, Ordering::Relaxed) + 1;
                    let mark = request.header("x-amz-meta-offshoot-put").unwrap_or_default().to_owned();
                    objects.insert(path, (request.body, number, mark));
                    answer(client, 200, &etag(number), b"")
                }
                "GET" | "HEAD" => match objects.get(&path) {
                    None => answer(client, 404, "", b""),
                    Some((body, number, mark)) => {
                        let more = format!("{}x-amz-meta-offshoot-put: {mark}\r\n", etag(*number));
                        answer(client, 200, &more, body)
                    }
                },
                _ => {
                    objects.remove(&path);
                    answer(client, 204, "", b"")
                }
            }
        })
    }

    fn limits() -> Limits {
        Limits {
            attempt: Duration::from_millis(1500),
            attempts: 3,
            pause_first: Duration::from_millis(10),
            pause_max: Duration::from_millis(50),
            circuit_failures: 1000,
            circuit_open: Duration::from_secs(3600),
        }
    }

    fn engine(&self, prefix: &str, limits: Limits) -> Arc<S3> {
        Arc::new(S3::open_with(&weed::url_at(&self.endpoint, prefix), weed::credentials(), limits).unwrap())
    }

    /// The next `count` requests whose first line contains `only` are treated so.
    fn treat(&self, manner: Manner, count: u32, only: &str) {
        *self.plan.lock().unwrap() = Plan { manner: Some(manner), left: count, only: only.to_owned() };
    }

    fn requests(&self) -> u32 {
        self.requests.load(Ordering::Relaxed)
    }
}

fn answer(client: &mut TcpStream, status: u16, headers: &str, body: &[u8]) -> io::Result<()> {
    let length = if status == 204 { String::new() } else { format!("Content-Length: {}\r\n", body.len()) };
    client.write_all(format!("HTTP/1.1 {status} X\r\n{headers}{length}Connection: close\r\n\r\n").as_bytes())?;
    client.write_all(body)
}

struct Request {
    /// First line and headers, without the empty line.
    head: String,
    body: Vec<u8>,
}

fn read_head(stream: &mut TcpStream) -> io::Result<Option<String>> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        if stream.read(&mut byte)? == 0 {
            return Ok(None);
        }
        head.push(byte[0]);
    }
    head.truncate(head.len() - 4);
    Ok(Some(String::from_utf8(head).expect("heads are text")))
}

fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines()
        .skip(1)
        .filter_map(|line| line.split_once(':'))
        .find(|(n, _)| n.eq_ignore_ascii_case(name))
        .map(|(_, v)| v.trim())
}

impl Request {
    fn read(client: &mut TcpStream) -> io::Result<Option<Self>> {
        let Some(head) = read_head(client)? else { return Ok(None) };
        let mut body = vec![0; header(&head, "content-length").map_or(0, |len| len.parse().expect("a number"))];
        client.read_exact(&mut body)?;
        Ok(Some(Self { head, body }))
    }

    fn header(&self, name: &str) -> Option<&str> {
        header(&self.head, name)
    }

    /// The server's head, ended and with the connection to be closed, and its body.
    fn forward(&self, port: u16) -> io::Result<(String, Vec<u8>)> {
        let mut server = TcpStream::connect(("127.0.0.1", port))?;
        server.set_read_timeout(Some(Duration::from_secs(60)))?;
        server.write_all(format!("{}\r\nConnection: close\r\n\r\n", self.head).as_bytes())?;
        server.write_all(&self.body)?;
        let head = read_head(&mut server)?.ok_or(io::ErrorKind::UnexpectedEof)?;
        let mut body = Vec::new();
        if !self.head.starts_with("HEAD") {
            server.read_to_end(&mut body)?;
        }
        Ok((format!("{head}\r\n\r\n"), body))
    }
}

fn count(counter: &AtomicU32) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// An error with its sources, which must not hold a secret.
#[track_caller]
fn told(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    assert!(!text.contains(weed::SECRET) && !text.contains("OFFSHOOTTESTKEY"), "{text}");
    text
}

fn open_error(engine: Arc<S3>) -> String {
    told(&Store::open_engine(engine, Mode::Shared).err().expect("it must be refused"))
}

#[test]
fn servers_that_ignore_conditions_are_refused_by_name() {
    for (headers, named) in [
        (&["if-none-match"][..], "ignores the header If-None-Match"),
        (&["if-match"][..], "ignores the header If-Match"),
        (&["if-none-match", "if-match"][..], "ignores the header If-None-Match"),
    ] {
        let front = Front::that_ignores(headers);
        let text = open_error(front.engine("ignores", Front::limits()));
        assert!(text.contains(named) && text.contains(&front.endpoint), "{text}");
    }
    // The same server passes when it looks at both.
    Front::that_ignores(&[]).engine("honest", Front::limits()).prove().unwrap();
}

#[test]
fn wrong_credentials_are_refused_at_once_and_not_shown() {
    let mut wrong = weed::credentials();
    wrong.secret = "another-secret-that-is-wrong".to_owned();
    let engine = S3::open_with(&weed::url_at(&weed::weed().endpoint, "wrong"), wrong, Front::limits()).unwrap();
    let error = engine.get("key").unwrap_err();
    let text = told(&error);
    assert!(!text.contains("another-secret") && text.contains("key"), "{text}");
    assert_eq!(engine.health().repeats, 0, "asking again would not help");
    let shown = format!("{engine:?} {:?}", weed::credentials());
    assert!(!shown.contains("secret"), "{shown}");
}

#[test]
fn what_passes_is_repeated_and_what_does_not_is_told_by_name() {
    let front = Front::before_weed();
    let prefix = weed::fresh_prefix();
    let engine = front.engine(&prefix, Front::limits());
    let bytes = Rng(1).noise(100_000);
    engine.put("packs/x", &bytes).unwrap();
    for manner in [
        Manner::Status(500),
        Manner::Status(503),
        Manner::Status(429),
        Manner::CutShort,
        Manner::Close,
        Manner::Silent,
        Manner::Drip,
    ] {
        let read = |offset: u64, len: usize| {
            let mut buf = vec![0; len];
            engine.open("packs/x").unwrap().read_at(offset, &mut buf).map(|()| buf)
        };
        // Twice it fails, the third time it does not.
        front.treat(manner, 2, "");
        assert_same(&read(1000, 5000).unwrap(), &bytes[1000..6000]);
        front.treat(manner, 2, "");
        assert_same(&engine.get("packs/x").unwrap().unwrap(), &bytes);
        front.treat(manner, 2, "");
        engine.put("packs/x", &bytes).unwrap();
        front.treat(manner, u32::MAX, "");
        let before = front.requests();
        let text = told(&read(0, 100).unwrap_err());
        assert!(text.contains("packs/x") && text.contains(&front.endpoint), "{manner:?}: {text}");
        assert_eq!(front.requests() - before, 3, "{manner:?}");
        front.treat(manner, 0, "");
    }
    // A body that is shorter than what was asked for, whatever its length says.
    front.treat(Manner::Shorter, u32::MAX, "");
    let mut buf = vec![0; 100];
    let text = told(&engine.open("packs/x").unwrap().read_at(0, &mut buf).unwrap_err());
    assert!(text.contains("packs/x"), "{text}");
}

#[test]
fn the_circuit_opens_and_lets_through_when_the_server_is_back() {
    let front = Front::before_weed();
    let limits = Limits { circuit_failures: 4, circuit_open: Duration::from_millis(300), ..Front::limits() };
    let engine = front.engine(&weed::fresh_prefix(), limits);
    engine.put("packs/x", b"there").unwrap();
    assert_eq!(engine.health().circuit, Circuit::Closed);
    front.treat(Manner::Status(503), u32::MAX, "");
    told(&engine.get("packs/x").unwrap_err());
    told(&engine.get("packs/x").unwrap_err());
    let health = engine.health();
    assert_ne!(health.circuit, Circuit::Closed, "{health:?}");
    assert_eq!(health.failures_in_a_row, 4);
    assert!(health.last_failure.unwrap().contains("503"));
    let before = front.requests();
    let text = (0..5).map(|_| told(&engine.get("packs/x").unwrap_err())).next_back().unwrap();
    assert!(front.requests() - before <= 2, "requests go to a server that is away");
    assert!(text.contains("in a row"), "{text}");
    front.treat(Manner::Honest, 0, "");
    let back = (0..100).find(|_| {
        std::thread::sleep(Duration::from_millis(50));
        engine.get("packs/x").is_ok_and(|found| found.as_deref() == Some(b"there"))
    });
    assert!(back.is_some());
    assert_eq!(engine.health().circuit, Circuit::Closed);
}

/// The server did it, and the answer was lost.
#[test]
fn heads_whose_answer_was_lost_are_read_back() {
    let front = Front::before_weed();
    let engine = front.engine(&weed::fresh_prefix(), Front::limits());
    for manner in [Manner::DoneBut(500), Manner::DoneBut(503)] {
        front.treat(manner, 1, "PUT ");
        let tag = engine.swap_head("h", &Expect::Absent, b"one").unwrap().unwrap();
        assert_eq!(engine.head("h").unwrap().unwrap(), (b"one".to_vec(), tag.clone()));
        front.treat(manner, 2, "PUT ");
        let next = engine.swap_head("h", &Expect::Etag(tag.clone()), b"two").unwrap().unwrap();
        assert_eq!(engine.head("h").unwrap().unwrap(), (b"two".to_vec(), next));
        // Refused is refused, lost or not.
        front.treat(manner, 1, "PUT ");
        match engine.swap_head("h", &Expect::Etag(tag), b"three") {
            Ok(Err(_)) | Err(_) => {}
            Ok(Ok(_)) => panic!("a swap from an old state went through"),
        }
        assert_eq!(engine.head("h").unwrap().unwrap().0, b"two");
        front.treat(manner, 1, "PUT ");
        engine.swap_head("h", &Expect::Any, b"four").unwrap().unwrap();
        assert_eq!(engine.head("h").unwrap().unwrap().0, b"four");
        assert!(engine.remove_head("h").unwrap());
    }
    // Eight writers while answers get lost: exactly as many successes as changes.
    front.treat(Manner::DoneBut(500), 6, "PUT ");
    engine.swap_head("count", &Expect::Any, b"0").unwrap().unwrap();
    let (won, unknown) = (AtomicU32::new(0), AtomicU32::new(0));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..3 {
                    let (bytes, etag) = engine.head("count").unwrap().unwrap();
                    let next: u32 = String::from_utf8(bytes).unwrap().parse::<u32>().unwrap() + 1;
                    match engine.swap_head("count", &Expect::Etag(etag), next.to_string().as_bytes()) {
                        Ok(Ok(_)) => count(&won),
                        Ok(Err(_)) => {}
                        Err(_) => count(&unknown),
                    }
                }
            });
        }
    });
    let counted: u32 = String::from_utf8(engine.head("count").unwrap().unwrap().0).unwrap().parse().unwrap();
    let (won, unknown) = (won.into_inner(), unknown.into_inner());
    assert!(won <= counted && counted <= won + unknown, "{won} won, {unknown} unknown, {counted} counted");
}

#[test]
fn large_packs_survive_lost_parts_and_lost_answers() {
    let front = Front::before_weed();
    let engine = front.engine(&weed::fresh_prefix(), Limits { attempt: Duration::from_secs(20), ..Front::limits() });
    let bytes = Rng(2).noise(20 << 20);
    for (manner, count, only) in [
        (Manner::Status(503), 2, "partNumber"),
        (Manner::Close, 2, "partNumber"),
        (Manner::DoneBut(500), 1, "POST "),
        (Manner::Status(500), 2, "POST "),
    ] {
        front.treat(manner, count, only);
        let mut upload = engine.upload("packs/large").unwrap();
        upload.append(&bytes).unwrap();
        upload.finish().unwrap();
        drop(upload);
        assert_same(&engine.get("packs/large").unwrap().unwrap(), &bytes);
        engine.remove(&["packs/large".to_owned()]).unwrap();
    }
    // What fails can be finished later; nothing is visible before.
    front.treat(Manner::Status(503), u32::MAX, "part");
    let mut upload = engine.upload("packs/later").unwrap();
    upload.append(&bytes[..10 << 20]).unwrap();
    let text = told(&upload.finish().unwrap_err());
    assert!(text.contains("packs/later"), "{text}");
    assert_eq!(engine.get("packs/later").unwrap(), None);
    front.treat(Manner::Honest, 0, "");
    upload.append(&bytes[10 << 20..]).unwrap();
    upload.finish().unwrap();
    assert_same(&engine.get("packs/later").unwrap().unwrap(), &bytes);
}

#[test]
fn a_store_behind_a_bad_way_never_serves_a_wrong_byte() {
    let front = Front::before_weed();
    let prefix = weed::fresh_prefix();
    let content = Mem(Rng(3).mixed(300));
    let honest = Store::open_engine(front.engine(&prefix, Front::limits()), Mode::Shared).unwrap();
    let version = publish(&honest, "vm", &content);
    for manner in [Manner::Flip, Manner::Shorter, Manner::CutShort, Manner::Status(500)] {
        let engine = front.engine(&prefix, Front::limits());
        // Opened well, then everything it reads of packs is bad.
        let store = Store::open_engine(Arc::clone(&engine) as Arc<dyn Engine>, Mode::ReadOnly).unwrap();
        front.treat(manner, u32::MAX, ".pack");
        let error = read_all(&store, &version).unwrap_err();
        let text = told(&error);
        assert!(text.contains(".pack"), "{manner:?}: {text}");
        let wrong = matches!(error, Error::Corrupt { .. });
        assert_eq!(wrong, manner == Manner::Flip, "{manner:?}: {text}");
        front.treat(Manner::Honest, 0, "");
        assert_same(&read_all(&store, &version).unwrap(), &content.0);
        // The same for indexes and heads.
        front.treat(manner, u32::MAX, ".idx");
        let unknown = Store::open_engine(Arc::clone(&engine) as Arc<dyn Engine>, Mode::ReadOnly);
        if let Ok(store) = unknown {
            told(&read_all(&store, &version).unwrap_err());
        }
        front.treat(manner, u32::MAX, "heads/vm");
        let text = told(&store.head("vm").unwrap_err());
        assert!(text.contains("heads/vm"), "{text}");
        front.treat(Manner::Honest, 0, "");
    }
    // A commit on a server that fails in between publishes nothing, and goes through later.
    let tx = honest.begin();
    let (next, _) = common::commit_all(&tx, &Mem(Rng(4).mixed(100))).unwrap();
    front.treat(Manner::Status(503), u32::MAX, "PUT ");
    let text = told(&tx.publish("vm", Expect::Any, &manifest(&[("ram", next)])).unwrap_err());
    assert!(text.contains("503"), "{text}");
    front.treat(Manner::Honest, 0, "");
    assert_eq!(honest.head("vm").unwrap().unwrap().0.versions["ram"], version);
    publish(&honest, "vm", &Mem(Rng(4).mixed(100)));
    assert_sound(&honest);
}
