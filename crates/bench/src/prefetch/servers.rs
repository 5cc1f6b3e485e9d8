//! The servers of the guest, driven from outside: one client each, which asks the next thing when it has an answer.

#[cfg(test)]
mod tests;

use crate::guest::Redis;
use crate::stores::Dice;
use crate::{Failure, Outcome};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

/// Keys in redis, bytes of each value, and how many of them most requests go to.
const KEYS: u64 = 8000;
const VALUE: usize = 4096;
const HOT: u64 = 800;
/// Rows of pgbench's table of accounts, and of one branch.
const ACCOUNTS: u64 = 200_000;
const BRANCH: u64 = 100_000;
/// Items of the shops.
const ITEMS: u64 = 12_000;
/// Files of nginx.
pub(super) const FILES: u64 = 3000;
/// A request that takes longer is a failure.
const LIMIT: Duration = Duration::from_secs(60);

/// More lost connections than this are no accident.
const LOST_MAX: u32 = 10;

/// One of the servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Server {
    Redis,
    Postgres,
    Web,
    Nginx,
    Jvm,
}

/// Whose requests: those an offshoot was trained on, or others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Set {
    A,
    B,
}

impl Server {
    pub(super) const USUAL: [Self; 3] = [Self::Redis, Self::Postgres, Self::Web];
    /// Those of a full measurement.
    pub(super) const FULL: [Self; 5] = [Self::Redis, Self::Postgres, Self::Web, Self::Nginx, Self::Jvm];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Redis => "redis",
            Self::Postgres => "postgresql",
            Self::Web => "web",
            Self::Nginx => "nginx",
            Self::Jvm => "jvm",
        }
    }

    /// Answers within which offshoots are compared, whatever time they take: what an all-local one gives in some seconds.
    pub(super) fn answers(self) -> usize {
        match self {
            Self::Redis => 600,
            Self::Postgres => 40,
            Self::Web => 60,
            Self::Nginx => 300,
            Self::Jvm => 60,
        }
    }

    /// The guest's port.
    pub(super) fn port(self) -> u16 {
        match self {
            Self::Redis => 6379,
            Self::Postgres => 5432,
            Self::Web => 80,
            Self::Nginx => 8081,
            Self::Jvm => 8082,
        }
    }
}

/// A client's connection, and what it will ask.
pub(super) struct Session {
    server: Server,
    address: SocketAddr,
    set: Set,
    dice: Dice,
    /// Connections that were lost.
    lost: u32,
    redis: Option<Redis>,
    postgres: Option<Postgres>,
}

/// How long a client goes on: both for so long behind the first answer, and for so many answers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Work {
    pub(super) busy: Duration,
    pub(super) answers: usize,
}

/// What a client saw. Times are seconds since it began.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub(super) struct Driven {
    /// The first answer.
    pub(super) first_s: f64,
    /// Every answer. The clock of these stands still during the query.
    pub(super) answers_s: Vec<f64>,
    /// The last of the answers that were asked for; the clock stands still likewise.
    pub(super) work_s: f64,
    /// How long the analytical query took.
    pub(super) query_s: Option<f64>,
}

impl Session {
    /// A client whose requests are told by `set` and `seed`.
    pub(super) fn new(server: Server, address: SocketAddr, set: Set, seed: u64) -> Self {
        let dice = Dice(seed.wrapping_mul(0x9e37_79b9) + u64::from(set == Set::B));
        Self { server, address, set, dice, lost: 0, redis: None, postgres: None }
    }

    /// Waits for the first answer and goes on asking until `work` is done; half-way through its answers it asks
    /// PostgreSQL for a summary of all accounts. `done` is called once, with the last of these answers.
    pub(super) fn drive(&mut self, began: Instant, work: Work, done: impl FnOnce() -> Outcome) -> Outcome<Driven> {
        self.first_answer(began)?;
        let first = began.elapsed();
        let mut seen = Driven { first_s: first.as_secs_f64(), ..Driven::default() };
        let mut paused = Duration::ZERO;
        let mut done = Some(done);
        loop {
            let now = began.elapsed() - paused;
            seen.answers_s.push(now.as_secs_f64());
            if seen.answers_s.len() >= work.answers
                && let Some(done) = done.take()
            {
                seen.work_s = now.as_secs_f64();
                done()?;
            }
            if now > first + work.busy && done.is_none() {
                return Ok(seen);
            }
            if self.server == Server::Postgres && seen.query_s.is_none() && seen.answers_s.len() > work.answers / 2 {
                let asked = Instant::now();
                self.summary()?;
                paused = asked.elapsed();
                seen.query_s = Some(paused.as_secs_f64());
            }
            self.go_on()?;
        }
    }

    /// A request; where its connection is lost, over a new one: the offshoot's kernel may take a client for one that its
    /// parent has just served from the same port.
    pub(super) fn go_on(&mut self) -> Outcome {
        let asked = Instant::now();
        let Err(error) = self.request() else { return Ok(()) };
        self.lost += 1;
        eprintln!(
            "{}: a connection was lost after {:.2} s: {error}",
            self.server.name(),
            asked.elapsed().as_secs_f64()
        );
        if self.lost > LOST_MAX {
            return Err(format!("{} connections were lost, the last by: {error}", self.lost).into());
        }
        self.first_answer(Instant::now())
    }

    /// Asks until there is an answer. A first attempt may be made too early and be lost, so that they are short first.
    fn first_answer(&mut self, began: Instant) -> Outcome {
        let mut limit = Duration::from_secs(1);
        loop {
            match self.connect(limit).and_then(|()| self.request_within(limit)) {
                Ok(()) => return Ok(()),
                Err(error) if began.elapsed() > LIMIT * 2 => {
                    return Err(format!("{} does not answer: {error}", self.server.name()).into());
                }
                Err(_) => std::thread::sleep(Duration::from_millis(1)),
            }
            if began.elapsed() > limit * 2 {
                limit = (limit * 2).min(LIMIT);
            }
        }
    }

    fn connect(&mut self, limit: Duration) -> Outcome {
        match self.server {
            Server::Redis => self.redis = Some(Redis::connect(self.address)?),
            Server::Postgres => self.postgres = Some(Postgres::connect(self.address, limit)?),
            Server::Web | Server::Nginx | Server::Jvm => {}
        }
        Ok(())
    }

    fn request(&mut self) -> Outcome {
        self.request_within(LIMIT)
    }

    fn request_within(&mut self, limit: Duration) -> Outcome {
        match self.server {
            Server::Redis => self.ask_redis(limit),
            Server::Postgres => self.transaction(limit),
            Server::Web => self.page(limit),
            Server::Nginx => self.file(limit),
            Server::Jvm => self.order(limit),
        }
    }

    /// Nine of ten keys are of the hot tenth, the same in both sets; the others may be any.
    fn ask_redis(&mut self, limit: Duration) -> Outcome {
        let key = if self.dice.below(10) < 9 { self.dice.below(HOT) * (KEYS / HOT) } else { self.dice.below(KEYS) };
        let what = self.dice.below(20);
        let (key, counter) = (format!("item:{key}"), format!("count:{}", key % 50));
        let value = vec![b'a' + what as u8; VALUE / 4];
        let redis = self.redis.as_mut().ok_or("not connected")?;
        redis.limit(limit)?;
        match what {
            0 => redis.send(&[b"SET", key.as_bytes(), &value])?,
            1 => redis.send(&[b"INCR", counter.as_bytes()])?,
            _ => redis.send(&[b"GET", key.as_bytes()])?,
        }
        redis.flush()?;
        redis.reply()?.map(drop).ok_or_else(|| Failure::from(format!("redis has lost {key}")))
    }

    /// What pgbench does by default (TPC-B).
    fn transaction(&mut self, limit: Duration) -> Outcome {
        let (account, change) = (self.dice.below(ACCOUNTS) + 1, self.dice.below(10_000));
        let branch = self.dice.below(ACCOUNTS / BRANCH) + 1;
        let teller = self.dice.below(ACCOUNTS / BRANCH * 10) + 1;
        let postgres = self.postgres.as_mut().ok_or("not connected")?;
        postgres.limit(limit)?;
        for statement in [
            "BEGIN".to_owned(),
            format!("UPDATE pgbench_accounts SET abalance = abalance + {change} WHERE aid = {account}"),
            format!("SELECT abalance FROM pgbench_accounts WHERE aid = {account}"),
            format!("UPDATE pgbench_tellers SET tbalance = tbalance + {change} WHERE tid = {teller}"),
            format!("UPDATE pgbench_branches SET bbalance = bbalance + {change} WHERE bid = {branch}"),
            format!("INSERT INTO pgbench_history VALUES ({teller}, {branch}, {account}, {change}, now(), '')"),
            "END".to_owned(),
        ] {
            postgres.query(&statement)?;
        }
        Ok(())
    }

    /// The analytical query: through all accounts.
    fn summary(&mut self) -> Outcome {
        let modulo = self.dice.below(5) + 3;
        let query = match self.set {
            Set::A => "SELECT bid, count(*), sum(abalance), max(aid) FROM pgbench_accounts GROUP BY bid".to_owned(),
            Set::B => {
                format!("SELECT aid % {modulo}, avg(abalance), min(bid) FROM pgbench_accounts GROUP BY 1 ORDER BY 2")
            }
        };
        let rows = self.postgres.as_mut().ok_or("not connected")?.query(&query)?;
        if rows == 0 { Err("PostgreSQL summed up nothing".into()) } else { Ok(()) }
    }

    fn page(&mut self, limit: Duration) -> Outcome {
        let item = if self.dice.below(10) < 7 { self.dice.below(ITEMS / 20) * 20 } else { self.dice.below(ITEMS) };
        let path = match (self.set, self.dice.below(20)) {
            (Set::A, 0..4) | (Set::B, 0..3) => format!("/report/{}", item % 100),
            (Set::B, 3..8) => format!("/search?word={}", self.dice.below(4000)),
            _ => format!("/item/{item}"),
        };
        get(self.address, &path, limit).map(drop)
    }

    /// A file that nginx has in its page cache; nine of ten are of a hot tenth.
    fn file(&mut self, limit: Duration) -> Outcome {
        let file = if self.dice.below(10) < 9 { self.dice.below(FILES / 10) * 10 } else { self.dice.below(FILES) };
        get(self.address, &format!("/{file}"), limit).map(drop)
    }

    /// Something of the shop on the JVM: an order, an item, or in set B also a search.
    fn order(&mut self, limit: Duration) -> Outcome {
        let item = if self.dice.below(10) < 7 { self.dice.below(ITEMS / 20) * 20 } else { self.dice.below(ITEMS) };
        let path = match (self.set, self.dice.below(20)) {
            (_, 0..6) => format!("/order/{item}"),
            (Set::B, 6..10) => format!("/search/{}", self.dice.below(4000)),
            _ => format!("/item/{item}"),
        };
        get(self.address, &path, limit).map(drop)
    }
}

/// One HTTP request; the body of the answer.
pub(super) fn get(address: SocketAddr, path: &str, limit: Duration) -> Outcome<String> {
    let mut stream = TcpStream::connect_timeout(&address, limit)?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_nodelay(true)?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    match answer.split_once("\r\n\r\n") {
        Some((head, body)) if head.split(' ').nth(1) == Some("200") => Ok(body.to_owned()),
        _ => Err(format!("{path}: {}", answer.lines().next().unwrap_or("no answer")).into()),
    }
}

/// Fills redis: values of which no two pages are alike.
pub(super) fn fill_redis(address: SocketAddr) -> Outcome {
    const SCRIPT: &[u8] = b"for i = tonumber(ARGV[1]), tonumber(ARGV[2]) - 1 do \
        local key = 'item:' .. i \
        redis.call('COPY', 'seed:' .. (i % 64), key) \
        redis.call('SETRANGE', key, (i * 37) % 3000, 'number ' .. i) end return 'OK'";
    let mut redis = Redis::connect(address)?;
    let mut dice = Dice(5);
    for seed in 0..64 {
        // As compressible as text: half of the bytes are random.
        let value: Vec<u8> =
            (0..VALUE).map(|_| if dice.below(2) == 0 { b' ' } else { dice.below(256) as u8 }).collect();
        redis.send(&[b"SET", format!("seed:{seed}").as_bytes(), &value])?;
        redis.flush()?;
        redis.reply()?;
    }
    for first in (0..KEYS).step_by(500) {
        let (from, to) = (first.to_string(), (first + 500).min(KEYS).to_string());
        redis.send(&[b"EVAL", SCRIPT, b"0", from.as_bytes(), to.as_bytes()])?;
        redis.flush()?;
        redis.reply()?;
    }
    Ok(())
}

/// Makes pgbench's tables.
pub(super) fn fill_postgres(address: SocketAddr) -> Outcome {
    let mut postgres = Postgres::connect(address, LIMIT)?;
    postgres.limit(Duration::from_secs(300))?;
    let branches = ACCOUNTS / BRANCH;
    for statement in [
        "CREATE TABLE pgbench_history (tid int, bid int, aid int, delta int, mtime timestamp, filler char(22))".into(),
        "CREATE TABLE pgbench_tellers (tid int PRIMARY KEY, bid int, tbalance int, filler char(84))".into(),
        "CREATE TABLE pgbench_accounts (aid int, bid int, abalance int, filler char(84))".into(),
        "CREATE TABLE pgbench_branches (bid int PRIMARY KEY, bbalance int, filler char(88))".into(),
        format!("INSERT INTO pgbench_branches SELECT n, 0 FROM generate_series(1, {branches}) n"),
        format!("INSERT INTO pgbench_tellers SELECT n, (n - 1) / 10 + 1, 0 FROM generate_series(1, {branches} * 10) n"),
        format!(
            "INSERT INTO pgbench_accounts SELECT n, (n - 1) / {BRANCH} + 1, 0, '' FROM generate_series(1, {ACCOUNTS}) n"
        ),
        "ALTER TABLE pgbench_accounts ADD PRIMARY KEY (aid)".into(),
        "VACUUM ANALYZE".into(),
        "CHECKPOINT".into(),
    ] {
        postgres.query(&statement)?;
    }
    Ok(())
}

/// A connection in PostgreSQL's own protocol, version 3: simple queries, no password ("Message Flow" in its manual).
struct Postgres {
    stream: TcpStream,
}

impl Postgres {
    fn connect(address: SocketAddr, limit: Duration) -> Outcome<Self> {
        let stream = TcpStream::connect_timeout(&address, limit)?;
        stream.set_nodelay(true)?;
        let mut postgres = Self { stream };
        postgres.limit(limit)?;
        let words = b"\0\x03\0\0user\0postgres\0database\0postgres\0\0";
        postgres.stream.write_all(&[&(words.len() as u32 + 4).to_be_bytes()[..], words].concat())?;
        postgres.until_ready()?;
        Ok(postgres)
    }

    fn limit(&self, limit: Duration) -> Outcome {
        Ok(self.stream.set_read_timeout(Some(limit))?)
    }

    /// Runs one statement; how many rows came.
    fn query(&mut self, statement: &str) -> Outcome<u64> {
        let mut message = vec![b'Q'];
        message.extend((statement.len() as u32 + 5).to_be_bytes());
        message.extend(statement.as_bytes());
        message.push(0);
        self.stream.write_all(&message)?;
        self.until_ready()
    }

    fn until_ready(&mut self) -> Outcome<u64> {
        let (mut rows, mut refused) = (0, None);
        loop {
            let mut head = [0; 5];
            self.stream.read_exact(&mut head)?;
            let len = u32::from_be_bytes([head[1], head[2], head[3], head[4]]);
            let mut body = vec![0; len.checked_sub(4).ok_or("PostgreSQL sent a message of no length")? as usize];
            self.stream.read_exact(&mut body)?;
            match head[0] {
                b'D' => rows += 1,
                b'E' => refused = Some(String::from_utf8_lossy(&body).replace('\0', " ")),
                b'Z' => return refused.map_or(Ok(rows), |why| Err(format!("PostgreSQL refused: {why}").into())),
                _ => {}
            }
            // Refused before it was ready: there is nothing more to come.
            if head[0] == b'E' && body.starts_with(b"SFATAL") {
                return Err(refused.unwrap_or_default().into());
            }
        }
    }
}

/// Whether PostgreSQL takes queries.
pub(super) fn reach_postgres(address: SocketAddr) -> Outcome {
    Postgres::connect(address, Duration::from_secs(5))?.query("SELECT 1").map(drop)
}
