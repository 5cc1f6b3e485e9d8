//! A guest, seen from outside: its web server, its redis, its console.

use crate::{Failure, Outcome};
use api::{Client, Upgraded};
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// A running guest of the default image.
#[derive(Clone, Debug)]
pub struct Guest {
    /// Name of its VM.
    pub name: String,
    /// Where its web server answers.
    pub http: SocketAddr,
    /// Where its redis answers.
    pub redis: SocketAddr,
}

/// How long one request may take.
const LIMIT: Duration = Duration::from_secs(5);
/// How long a client that waits for a first answer waits for each attempt: one that was made too early is lost.
const ATTEMPT: Duration = Duration::from_secs(1);

impl Guest {
    /// From the ports it publishes.
    ///
    /// # Errors
    /// Where a port is missing.
    pub fn of(name: &str, publish: &[String]) -> Outcome<Self> {
        let find = |guest: u16| -> Outcome<SocketAddr> {
            let ends = format!(":{guest}");
            let found = publish.iter().find_map(|p| p.strip_suffix(ends.as_str()));
            Ok(found.ok_or_else(|| Failure::from(format!("{name} publishes no port {guest}")))?.parse()?)
        };
        Ok(Self { name: name.into(), http: find(80)?, redis: find(6379)? })
    }

    /// One HTTP request; true for status 200.
    #[must_use]
    pub fn answers(&self) -> bool {
        http_ok(self.http, LIMIT).unwrap_or(false)
    }

    /// Waits until the web server answers 200 and, with `nonce`, redis returns it.
    ///
    /// # Errors
    /// Where that takes longer than `limit`.
    pub fn await_response(&self, nonce: Option<&str>, limit: Duration) -> Outcome<Instant> {
        let began = Instant::now();
        let end = began + limit;
        while Instant::now() < end {
            if http_ok(self.http, ATTEMPT).unwrap_or(false) {
                match nonce {
                    None => return Ok(Instant::now()),
                    Some(want) if self.get("nonce").ok().flatten().as_deref() == Some(want) => {
                        return Ok(Instant::now());
                    }
                    Some(_) => {}
                }
            }
            // One that has been refused for a while is booting, and each attempt is work for it.
            let pause_ms = if began.elapsed() < ATTEMPT { 1 } else { 20 };
            std::thread::sleep(Duration::from_millis(pause_ms));
        }
        Err(format!("{} did not answer within {limit:?}", self.name).into())
    }

    /// A redis key's value.
    ///
    /// # Errors
    /// What the connection met, or redis' own error.
    pub fn get(&self, key: &str) -> Outcome<Option<String>> {
        Redis::connect(self.redis)?.get(key)
    }

    /// Sets a redis key.
    ///
    /// # Errors
    /// What the connection met, or redis' own error.
    pub fn set(&self, key: &str, value: &str) -> Outcome {
        let mut redis = Redis::connect(self.redis)?;
        redis.send(&[b"SET", key.as_bytes(), value.as_bytes()])?;
        redis.flush()?;
        redis.reply().map(|_| ())
    }

    /// Runs a script within redis and returns what it says.
    ///
    /// # Errors
    /// What the connection met, or redis' own error.
    pub fn eval(&self, script: &str, arguments: &[&str]) -> Outcome<Option<String>> {
        let mut redis = Redis::connect(self.redis)?;
        let mut words = vec![b"EVAL".as_slice(), script.as_bytes(), b"0"];
        words.extend(arguments.iter().map(|a| a.as_bytes()));
        redis.send(&words)?;
        redis.flush()?;
        redis.reply()
    }

    /// Loads `bytes` of values into redis, 16 KiB each, every page of them random and different, and a nonce.
    ///
    /// Software emulation receives a few MB a second, so the values are made within the guest: each is a copy of
    /// one of 64 random ones, with bytes of its own in every page, so that neither deduplication nor compression
    /// finds anything in them.
    ///
    /// # Errors
    /// What the connection met, or redis' own error.
    pub fn load(&self, bytes: u64, nonce: &str) -> Outcome {
        const VALUE: usize = 16 << 10;
        const SEEDS: usize = 64;
        const SCRIPT: &[u8] = b"for i = tonumber(ARGV[1]), tonumber(ARGV[2]) - 1 do \
            local key = 'load:' .. i \
            redis.call('COPY', 'seed:' .. (i % 64), key) \
            for page = 0, 3 do redis.call('SETRANGE', key, page * 4096, ARGV[3] .. i .. ':' .. page) end \
            end return 'OK'";
        let mut redis = Redis::connect(self.redis)?;
        let mut random = std::fs::File::open("/dev/urandom")?;
        let mut value = vec![0u8; VALUE];
        for seed in 0..SEEDS {
            random.read_exact(&mut value)?;
            redis.send(&[b"SET", format!("seed:{seed}").as_bytes(), &value])?;
            redis.flush()?;
            redis.reply()?;
        }
        let keys = bytes / VALUE as u64;
        for first in (0..keys).step_by(256) {
            let (from, to) = (first.to_string(), (first + 256).min(keys).to_string());
            redis.send(&[b"EVAL", SCRIPT, b"0", from.as_bytes(), to.as_bytes(), nonce.as_bytes()])?;
            redis.flush()?;
            redis.reply()?;
        }
        self.set("nonce", nonce)
    }

    /// Runs a command in a root shell on the console and returns what it printed.
    ///
    /// # Errors
    /// Where the console does not answer within `limit`.
    pub fn shell(&self, client: &Client, command: &str, limit: Duration) -> Outcome<String> {
        let Upgraded { early: mut seen, stream } = client.upgrade(&format!("/v1/vms/{}/console", self.name))?;
        stream.set_read_timeout(Some(Duration::from_millis(100)))?;
        let mark =
            format!("{:08x}", std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.subsec_nanos());
        // The quotes keep the marks out of the echo of the command itself.
        let line = format!("echo B'E'G{mark}; {command}; echo E'N'D{mark}\n");
        (&stream).write_all(line.as_bytes())?;
        let (begin, finish) = (format!("BEG{mark}"), format!("END{mark}"));
        let end = Instant::now() + limit;
        let mut buffer = [0; 4096];
        while Instant::now() < end {
            match (&stream).read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => seen.extend_from_slice(&buffer[..n]),
                Err(e) if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {}
                Err(e) => return Err(e.into()),
            }
            let text = String::from_utf8_lossy(&seen).replace('\r', "");
            if let Some((_, rest)) = text.split_once(begin.as_str())
                && let Some((out, _)) = rest.split_once(finish.as_str())
            {
                return Ok(out.trim().to_owned());
            }
        }
        Err(format!(
            "{}: `{command}` did not end within {limit:?}; the console showed: {}",
            self.name,
            String::from_utf8_lossy(&seen)
        )
        .into())
    }
}

/// One `GET /`; whether its status is 200.
///
/// # Errors
/// What the connection met.
pub fn http_ok(address: SocketAddr, limit: Duration) -> std::io::Result<bool> {
    let mut stream = TcpStream::connect_timeout(&address, limit)?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    stream.set_nodelay(true)?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut answer = Vec::new();
    let read = stream.read_to_end(&mut answer);
    if let Err(error) = &read
        && matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
    {
        keep(stream);
    }
    read.map(|_| answer.starts_with(b"HTTP/1.1 200"))
}

/// For how long passt waits for a guest to take a connection (`SYN_TIMEOUT`), and some more.
const GIVEN_UP: Duration = Duration::from_secs(12);

/// Keeps a connection that was not answered until passt has given it up. One that its client closes before that, passt
/// (0.0~git20230309) attends to in a busy loop: it would take a whole processor from the guest that boots.
fn keep(stream: TcpStream) {
    static KEPT: Mutex<Vec<(Instant, TcpStream)>> = Mutex::new(Vec::new());
    let mut kept = KEPT.lock().expect("no holder panics");
    kept.retain(|(since, _)| since.elapsed() < GIVEN_UP);
    kept.push((Instant::now(), stream));
}

pub(crate) struct Redis {
    reader: BufReader<TcpStream>,
    out: Vec<u8>,
}

impl Redis {
    pub(crate) fn connect(address: SocketAddr) -> Outcome<Self> {
        let stream = TcpStream::connect_timeout(&address, LIMIT)?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        stream.set_nodelay(true)?;
        Ok(Self { reader: BufReader::new(stream), out: Vec::new() })
    }

    /// How long an answer may take.
    pub(crate) fn limit(&self, limit: Duration) -> Outcome {
        Ok(self.reader.get_ref().set_read_timeout(Some(limit))?)
    }

    /// One command in redis' serialization protocol, kept until [`Redis::flush`].
    pub(crate) fn send(&mut self, words: &[&[u8]]) -> Outcome {
        write!(self.out, "*{}\r\n", words.len())?;
        for word in words {
            write!(self.out, "${}\r\n", word.len())?;
            self.out.extend_from_slice(word);
            self.out.extend_from_slice(b"\r\n");
        }
        Ok(())
    }

    pub(crate) fn flush(&mut self) -> Outcome {
        self.reader.get_mut().write_all(&self.out)?;
        self.out.clear();
        Ok(())
    }

    fn get(&mut self, key: &str) -> Outcome<Option<String>> {
        self.send(&[b"GET", key.as_bytes()])?;
        self.flush()?;
        self.reply()
    }

    pub(crate) fn reply(&mut self) -> Outcome<Option<String>> {
        let mut line = String::new();
        self.reader.read_line(&mut line)?;
        let line = line.trim_end();
        match line.split_at_checked(1) {
            Some(("+" | ":", text)) => Ok(Some(text.into())),
            Some(("-", error)) => Err(format!("redis refused: {error}").into()),
            Some(("$", "-1")) => Ok(None),
            Some(("$", length)) => {
                let mut value = vec![0; length.parse::<usize>()? + 2];
                self.reader.read_exact(&mut value)?;
                value.truncate(value.len() - 2);
                Ok(Some(String::from_utf8_lossy(&value).into_owned()))
            }
            _ => Err(format!("redis answered `{line}`").into()),
        }
    }
}
