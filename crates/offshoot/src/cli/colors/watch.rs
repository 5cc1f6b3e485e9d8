//! Memory live: redrawn about twice a second, on a screen of its own that is gone afterwards, however it ends.
//!
//! The states are looked at each time, the colors every few seconds: to find these takes reading. Without a terminal a
//! line of counters is printed each second.

use super::super::Outcome;
use super::picture::Pages;
use super::terminal::{Depth, Style, legend, map};
use super::{kernel, path, size};
use api::{Client, ClientError, Colors, ErrorKind, PageState, VmStats};
use base::units::human;
use rustix::termios::{LocalModes, OptionalActions, SpecialCodeIndex, Termios, tcgetattr, tcsetattr};
use std::io::{IsTerminal, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};
use tokio::signal::unix::{SignalKind, signal};

/// Between two pictures.
const EVERY: Duration = Duration::from_millis(500);
/// Between two lines of counters.
const LINE: Duration = Duration::from_secs(1);
/// Colors older than this are found anew; where that takes long, after ten times as long.
const COLORS_AGE: Duration = Duration::from_secs(3);

/// Why the wait for the next picture ended early.
enum Event {
    /// The terminal has another size.
    Resized,
    /// Somebody wants to see no more.
    End,
}

/// Watches a VM until it ends or somebody interrupts.
pub(super) fn watch(client: &Client, name: &str) -> Outcome {
    // Whatever is wrong with the name is said before the screen changes.
    let mut frame = Frame::ask(client, name, None)?;
    let events = events()?;
    let screen = std::io::stdout().is_terminal().then(Screen::enter);
    let every = if screen.is_some() { EVERY } else { LINE };
    let mut before: Option<Frame> = None;
    let ended = loop {
        let drawn = match &screen {
            Some(screen) => screen.draw(&frame, before.as_ref()),
            None => line(&frame),
        };
        if let Err(error) = drawn {
            // Nobody reads any more.
            break (error.kind() != std::io::ErrorKind::BrokenPipe).then(|| error.into());
        }
        match wait(&events, frame.at + every) {
            Some(Event::End) => break None,
            Some(Event::Resized) => continue,
            None => {}
        }
        match Frame::ask(client, name, Some(&frame)) {
            Ok(next) => before = Some(std::mem::replace(&mut frame, next)),
            Err(error) => break Some(error),
        }
    };
    drop(screen);
    match ended {
        None => Ok(()),
        Some(error) => match error.downcast_ref() {
            Some(ClientError::Refused(said)) if matches!(said.kind, ErrorKind::Conflict | ErrorKind::NotFound) => {
                eprintln!("{name} has ended");
                Ok(())
            }
            _ => Err(error),
        },
    }
}

/// What is shown at one moment.
struct Frame {
    at: Instant,
    colors: Colors,
    pages: Pages,
    stats: VmStats,
}

impl Frame {
    fn ask(client: &Client, name: &str, before: Option<&Self>) -> Result<Self, Box<dyn std::error::Error>> {
        let at = Instant::now();
        let age =
            before.map_or(COLORS_AGE, |b| COLORS_AGE.max(Duration::from_secs_f64(b.colors.account.took_ms / 100.0)));
        let colors: Colors = client.get(&format!("{}?age_ms={}", path(name), age.as_millis()))?;
        let stats = client.get(&format!("/v1/vms/{name}/stats"))?;
        Ok(Self { at, pages: Pages::of(&colors)?, colors, stats })
    }

    fn bytes(&self, state: PageState) -> u64 {
        self.colors.legend.iter().map(|color| color.by_state[state as usize]).sum::<u64>() * self.colors.page_bytes
    }

    fn counter(&self, name: &str) -> u64 {
        self.stats.mirror[name].as_u64().unwrap_or(0)
    }

    /// Where memory is.
    fn states(&self) -> String {
        let states = [PageState::Dirty, PageState::Local, PageState::Ready, PageState::Absent];
        let states: Vec<String> = states.iter().map(|s| format!("{} {}", s.name(), human(self.bytes(*s)))).collect();
        states.join("  ")
    }

    /// What was fetched.
    fn fetches(&self) -> String {
        let ahead = &self.stats.ahead;
        let ahead = match ahead.fetched_bytes {
            0 => String::new(),
            fetched => {
                format!("  ahead {} ({:.0}% used)", human(fetched), 100.0 * ahead.used_bytes as f64 / fetched as f64)
            }
        };
        let (faults, fetched) = (self.counter("ram_faults"), human(self.counter("ram_fetched_bytes")));
        format!("faults {faults}  fetched {fetched}{ahead}")
    }

    /// What changed since the last picture, for each second.
    fn rates(&self, before: &Self) -> String {
        let seconds = (self.at - before.at).as_secs_f64().max(0.001);
        let rate = |now: u64, then: u64| now.saturating_sub(then) as f64 / seconds;
        let (dirty, then) = (self.bytes(PageState::Dirty), before.bytes(PageState::Dirty));
        let faults = rate(self.counter("ram_faults"), before.counter("ram_faults"));
        let fetched = rate(self.counter("ram_fetched_bytes"), before.counter("ram_fetched_bytes"));
        format!(
            "{}/s more dirty  {faults:.0} faults/s  {}/s fetched",
            human(rate(dirty, then) as u64),
            human(fetched as u64)
        )
    }
}

/// One line of counters.
fn line(frame: &Frame) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}  {}  {}", frame.colors.taken, frame.states(), frame.fetches())?;
    out.flush()
}

/// Signals, as events: heard from now on, by a thread of its own for as long as the process lives.
fn events() -> std::io::Result<Receiver<Event>> {
    let (tx, rx) = channel();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let context = runtime.enter();
    let mut resized = signal(SignalKind::window_change())?;
    let mut interrupted = signal(SignalKind::interrupt())?;
    let mut terminated = signal(SignalKind::terminate())?;
    let mut hung_up = signal(SignalKind::hangup())?;
    drop(context);
    let listen = async move {
        loop {
            let event = tokio::select! {
                _ = resized.recv() => Event::Resized,
                _ = interrupted.recv() => Event::End,
                _ = terminated.recv() => Event::End,
                _ = hung_up.recv() => Event::End,
            };
            if tx.send(event).is_err() {
                return;
            }
        }
    };
    std::thread::Builder::new().name("signals".into()).spawn(move || runtime.block_on(listen))?;
    Ok(rx)
}

/// Waits for an event, or until it is time.
fn wait(events: &Receiver<Event>, until: Instant) -> Option<Event> {
    let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(50));
    match events.recv_timeout(left) {
        Ok(event) => Some(event),
        Err(RecvTimeoutError::Timeout) => None,
        Err(RecvTimeoutError::Disconnected) => {
            std::thread::sleep(left);
            None
        }
    }
}

/// A screen beside the one that the shell writes on, without cursor or echo; as before when it is dropped.
struct Screen {
    before: Option<Termios>,
    style: Style,
}

impl Screen {
    fn enter() -> Self {
        let before = tcgetattr(std::io::stdin()).ok();
        if let Some(before) = &before {
            let mut quiet = before.clone();
            quiet.local_modes &= !(LocalModes::ECHO | LocalModes::ICANON);
            // One that is put to sleep here would leave this screen to the shell.
            quiet.special_codes[SpecialCodeIndex::VSUSP] = 0;
            let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, &quiet);
        }
        print!("\x1b[?1049h\x1b[?25l\x1b[2J");
        Self { before, style: Style::of(|name| std::env::var(name).ok()) }
    }

    fn draw(&self, frame: &Frame, before: Option<&Frame>) -> std::io::Result<()> {
        let (columns, lines) = size();
        let text = picture(frame, before, self.style, (columns, lines));
        let mut out = std::io::stdout().lock();
        // As one piece for terminals that know of that, and without a moment of emptiness for the others.
        write!(out, "\x1b[?2026h\x1b[H")?;
        for (at, line) in text.iter().enumerate() {
            write!(out, "{}{line}\x1b[0m\x1b[K", if at > 0 { "\r\n" } else { "" })?;
        }
        write!(out, "\x1b[J\x1b[?2026l")?;
        out.flush()
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let mut out = std::io::stdout().lock();
        let _ = write!(out, "\x1b[0m\x1b[?2026l\x1b[?25h\x1b[?1049l");
        let _ = out.flush();
        if let Some(before) = &self.before {
            // What was typed meanwhile was meant for nobody.
            let _ = tcsetattr(std::io::stdin(), OptionalActions::Flush, before);
        }
    }
}

/// The lines of one picture, no more than fit.
fn picture(frame: &Frame, before: Option<&Frame>, style: Style, (columns, lines): (usize, usize)) -> Vec<String> {
    let colors = &frame.colors;
    let clock = colors.taken.get(11..19).unwrap_or(&colors.taken);
    let about = format!("{} · {} · {clock}", super::picture::round(colors.pages * colors.page_bytes), kernel(colors));
    let mut foot = legend(colors, style, columns);
    foot.push(String::new());
    foot.push(clip(&frame.states(), columns));
    foot.push(clip(&frame.fetches(), columns));
    if let Some(before) = before {
        foot.push(style.dim(&clip(&frame.rates(before), columns)));
    }
    let used = foot.len() + 3;
    let mut out = vec![
        format!("{}  {}", style.bold(&colors.name), style.dim(&clip(&about, columns.saturating_sub(20)))),
        String::new(),
    ];
    out.extend(map(colors, &frame.pages, style, (columns, lines.saturating_sub(used).max(4))));
    out.push(String::new());
    out.append(&mut foot);
    if style.depth == Depth::Letters {
        out.iter_mut().for_each(|line| *line = clip(line, columns));
    }
    out.truncate(lines.max(1));
    out
}

fn clip(text: &str, columns: usize) -> String {
    text.chars().take(columns).collect()
}
