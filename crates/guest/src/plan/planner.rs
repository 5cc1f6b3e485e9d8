//! The planner.
//!
//! Under `auto` a fault says one of two things. The page is in the plan and not here: the guest is ahead of the plan,
//! so what followed that page in earlier recordings is wanted next. Or the page is not in the plan: what follows it in
//! color space is wanted. Both go ahead of the rest of the plan, which streams whenever the link has room. Windows
//! grow where what they brought is used and shrink where it is not; a plan that proves wrong is dropped.

use super::policy::{Eager, Policy};
use super::profile::{Entry, log_time};
use super::template::{COLORS, Template, Traits};
use super::window::Window;
use super::{Page, Windows};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

/// Pages that wait to be asked for because of faults; older ones fall out, they have missed their time.
const REACTIVE_MAX: usize = 4096;
/// Pages behind a fault in plan order, at first.
const PLAN_WINDOW: u32 = 64;
/// A plan of which less than this part is used is dropped.
const PLAN_WRONG: f32 = 0.2;
/// Judged over at least so many pages.
const PLAN_JUDGED: u64 = 1024;
/// Where nothing is recorded, the first offshoot on a node pays for all: pages this much less likely are fetched.
const UNKNOWN: f32 = 0.25;
/// Pages that are touched this early (as `Entry::early`: 255 ms) are to be here before the guest runs, but no more than
/// these: 16 MiB.
const FIRST: u16 = 8 * 256;
const FIRST_MAX: usize = 4096;
/// The same where nothing is recorded: 128 MiB.
const FIRST_MAX_UNKNOWN: usize = 32768;
/// A step of time, as `Entry::early`: half of a doubling.
const STEP: u16 = 128;

/// Pages are fetched ahead that recordings touched by this time, and half of the guest's age behind: all that belongs to a
/// start, and later what is likely within the time that the guest may still live.
const HORIZON: Duration = Duration::from_secs(8);
/// Waits for pages whose time has not come before the next step of time is brought forward: many are chance, as with keys
/// that clients choose at random.
const OUTRUN: usize = 32;
/// Pages that follow such a page in plan order and come with it.
const EARLY_WINDOW: u32 = 16;

/// Where a page stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Away,
    /// Waits to be asked for because of a fault.
    Wanted,
    /// Asked for ahead, by the class named.
    Ahead(Class),
    /// A fault brought it, or it was used.
    Touched,
}

/// Which reason brought a page: a color's window, or the plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    Color(u8),
    Plan,
}

/// What prefetch did, in pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Faults on pages that nobody had asked for.
    pub faults: u64,
    /// Pages asked for ahead.
    pub prefetched: u64,
    /// Of these, touched later.
    pub used: u64,
}

/// Decides what to fetch next for the offshoots of one template on one node.
pub struct Planner {
    template: Arc<Template>,
    policy: Policy,
    states: Vec<State>,
    /// What faults call for, with the reason.
    reactive: VecDeque<(Page, Class)>,
    /// What is fetched anyhow, in order, and how far that has come.
    plan: Vec<Page>,
    cursor: usize,
    /// Of how many of the plan's pages the time has come, by the guest's age ([`Planner::set_age`]).
    due: usize,
    /// Where in the plan each step of time ([`STEP`]) begins.
    steps: Vec<usize>,
    /// The guest has shown that this step's time has come.
    step_seen: usize,
    /// Waits for pages whose time has not come, since that was shown last.
    outran: usize,
    /// A page's place in the plan; `u32::MAX` where it is in none.
    places: Vec<u32>,
    /// Pages of the plan to be here before the guest runs.
    first: usize,
    windows: [Window; COLORS],
    plan_window: Window,
    /// Faults by segment, for Twinkle.
    segments: HashMap<u32, u32>,
    tallies: [Tally; COLORS],
    cost: Option<f32>,
}

impl Planner {
    /// A planner for offshoots of which none has started.
    #[must_use]
    pub fn new(template: Arc<Template>, policy: Policy, eager: Eager) -> Self {
        let (template, policy) = match policy {
            // As little as possible is nothing, and no windows either.
            Policy::Auto | Policy::Plain if eager.dial() == 0.0 => (template, Policy::None),
            Policy::Plain => (Arc::new(template.plain()), Policy::Auto),
            policy => (template, policy),
        };
        let (plan, first) = plan(&template, &policy, eager);
        let steps = match policy {
            // A full copy is one, whenever its pages are touched.
            Policy::Auto if eager.dial() < 1.0 => steps(&template, &plan),
            _ => Vec::new(),
        };
        let pages = template.stored.len() as usize;
        let mut places = vec![u32::MAX; pages];
        for (place, &page) in plan.iter().enumerate() {
            places[page as usize] = place as u32;
        }
        let chances = chances(&template);
        let windows = std::array::from_fn(|color| {
            let (traits, first) = (&template.traits[color], window(&policy, &template.traits[color]));
            // What recordings left out is touched as seldom as they say.
            let silent = (chances[color] / traits.prior.max(f32::EPSILON)).min(1.0);
            let seldom = policy == Policy::Auto && template.profile.recordings() > 1;
            let pages = if seldom { ((first as f32 * silent) as u32).max(first.min(2)) } else { first };
            Window::new(pages, template.profile.recordings() == 0)
        });
        Self {
            template,
            policy,
            states: vec![State::Away; pages],
            reactive: VecDeque::new(),
            due: plan.len(),
            plan,
            cursor: 0,
            steps,
            step_seen: 0,
            outran: 0,
            places,
            first,
            windows,
            plan_window: Window::new(PLAN_WINDOW, false),
            segments: HashMap::new(),
            tallies: [Tally::default(); COLORS],
            cost: None,
        }
    }

    /// Says what a page takes of the link's time, over what a fault waits for ([`Pace::page_cost`]): the further the
    /// store, the less of what is fetched ahead must be used for it to pay.
    ///
    /// [`Pace::page_cost`]: super::Pace::page_cost
    pub fn set_cost(&mut self, cost: Option<f32>) {
        self.cost = cost;
    }

    /// Tells how long the guest has run. What recordings touched late is not fetched long before its time: a guest that ends
    /// early never needs it, and one that is faster than those recorded asks for it by a fault, which brings what follows.
    pub fn set_age(&mut self, age: Duration) {
        let horizon = HORIZON + age / 2;
        let step = step_of(log_time(u32::try_from(horizon.as_millis()).unwrap_or(u32::MAX))).max(self.step_seen);
        self.due = self.steps.get(step).copied().unwrap_or(self.plan.len());
    }

    /// The guest waits for a page of the plan whose time has not come: it is faster than those recorded, or it is chance.
    fn outruns(&mut self, page: Page) {
        let place = self.places[page as usize] as usize;
        if place < self.plan.len() && place >= self.due {
            self.outran += 1;
            if self.outran < OUTRUN {
                return;
            }
            self.outran = 0;
            let step = self.steps.partition_point(|&begins| begins <= self.due);
            self.step_seen = step;
            self.due = self.steps.get(step).copied().unwrap_or(self.plan.len());
        }
    }

    /// Pages that are to be here before the guest runs: so many of the first that [`Planner::next`] gives.
    #[must_use]
    pub fn first(&self) -> usize {
        self.first
    }

    /// Whether it is `auto`: what it would have here first is worth a short wait and no long one.
    #[must_use]
    pub fn adapts(&self) -> bool {
        self.policy == Policy::Auto
    }

    /// Whether anything was recorded.
    #[must_use]
    pub fn is_trained(&self) -> bool {
        self.template.profile.recordings() > 0
    }

    /// The guest touched `page`, and it had to be fetched. A page that was asked for ahead and had not arrived counts
    /// as used: it was the right one. `dear`: the guest waited for it so long that guessing pays; where it did not,
    /// `auto` keeps to what was recorded.
    pub fn fault(&mut self, page: Page, dear: bool) {
        let Some(&state) = self.states.get(page as usize) else { return };
        match state {
            State::Touched => return,
            State::Ahead(_) => self.used(page),
            State::Away | State::Wanted => {
                self.tallies[self.color(page)].faults += 1;
                self.states[page as usize] = State::Touched;
                self.outruns(page);
            }
        }
        match self.policy {
            Policy::None | Policy::All | Policy::Replay | Policy::Intersect => {}
            Policy::Readahead(pages) => {
                let ahead: Vec<Page> = (page.saturating_add(1)..=page.saturating_add(pages)).collect();
                self.want(ahead, Class::Color(0));
            }
            Policy::Twinkle { pages, faults } => self.count_segment(page, pages, faults),
            Policy::Color(_) => self.want_color(page),
            Policy::Auto if dear || self.is_planned(page) => self.want_best(page),
            // It cost little, and says what is next.
            Policy::Auto if self.follows(page) => self.want_color(page),
            Policy::Auto | Policy::Plain => {}
        }
    }

    /// The guest touched `page`, which prefetch had brought.
    pub fn used(&mut self, page: Page) {
        let Some(&State::Ahead(class)) = self.states.get(page as usize) else { return };
        self.states[page as usize] = State::Touched;
        self.tallies[self.color(page)].used += 1;
        self.window(class).used();
    }

    /// Looks at what was used since it last did: to be called a few times a second, after [`Planner::used`] has been
    /// told what was touched.
    pub fn judge(&mut self) {
        if self.policy != Policy::Auto {
            return;
        }
        for window in &mut self.windows {
            window.judge(self.cost);
        }
        self.plan_window.judge(self.cost);
    }

    /// Writes up to `most` pages to fetch next into `out`, the most wanted first. None: nothing is wanted for now.
    pub fn next(&mut self, most: usize, out: &mut Vec<Page>) {
        let until = out.len() + most;
        while out.len() < until {
            let Some((page, class)) = self.reactive.pop_front() else { break };
            if self.states[page as usize] == State::Wanted {
                self.ask(page, class, out);
            }
        }
        while out.len() < until && self.cursor < self.due {
            let page = self.plan[self.cursor];
            self.cursor += 1;
            if matches!(self.states[page as usize], State::Away | State::Wanted) {
                self.ask(page, Class::Plan, out);
            }
            self.drop_wrong_plan();
        }
    }

    /// A page that was asked for could not be brought, or the host dropped it again.
    pub fn lost(&mut self, page: Page) {
        if let Some(state @ State::Ahead(_)) = self.states.get_mut(page as usize) {
            *state = State::Away;
        }
    }

    /// Whether nothing is left to be fetched ahead until another fault comes.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.reactive.is_empty() && self.cursor >= self.plan.len()
    }

    /// Whether a fault called for pages that were not given out yet.
    #[must_use]
    pub fn is_urgent(&self) -> bool {
        !self.reactive.is_empty()
    }

    /// The order in which pages of a template that were recorded are best laid down: as `auto` fetches them, and behind
    /// these, in the same order, those that it leaves to faults.
    #[must_use]
    pub fn layout(template: &Template) -> Vec<Page> {
        let likely = Eager::default().threshold();
        let odds = template.profile.odds();
        let by_likelihood =
            |wanted: bool| in_plan_order(template, |entry| (odds.likelihood(entry) >= likely) == wanted);
        [by_likelihood(true), by_likelihood(false)].concat()
    }

    /// What it knows of a page, for a log.
    #[must_use]
    pub fn describe(&self, page: Page) -> String {
        let state = self.states.get(page as usize).copied().unwrap_or(State::Away);
        let place = self.places.get(page as usize).copied().unwrap_or(u32::MAX);
        let place =
            if place == u32::MAX { "no plan".to_owned() } else { format!("place {place} of {}", self.plan.len()) };
        let color = crate::Color::ALL.into_iter().find(|color| *color as usize == self.color(page));
        format!("{state:?}, {}, {place}", color.map_or("unknown", |color| color.name()))
    }

    /// By color.
    #[must_use]
    pub fn tallies(&self) -> &[Tally; COLORS] {
        &self.tallies
    }

    /// The pages asked for ahead and not touched so far: what a scan of the guest's page tables has to look at.
    pub fn unused(&self) -> impl Iterator<Item = Page> + '_ {
        let ahead = |state: &State| matches!(state, State::Ahead(_));
        self.states.iter().enumerate().filter(move |(_, state)| ahead(state)).map(|(page, _)| page as Page)
    }

    fn color(&self, page: Page) -> usize {
        usize::from(self.template.space.color(page)) % COLORS
    }

    fn window(&mut self, class: Class) -> &mut Window {
        match class {
            Class::Plan => &mut self.plan_window,
            Class::Color(color) => &mut self.windows[usize::from(color) % COLORS],
        }
    }

    fn ask(&mut self, page: Page, class: Class, out: &mut Vec<Page>) {
        self.states[page as usize] = State::Ahead(class);
        self.tallies[self.color(page)].prefetched += 1;
        self.window(class).asked(1);
        out.push(page);
    }

    /// Puts pages that are away in front of the plan.
    fn want(&mut self, pages: Vec<Page>, class: Class) {
        for page in pages {
            let stored = u64::from(page) < self.template.stored.len() && self.template.stored.get(page.into());
            if !stored || self.states[page as usize] != State::Away {
                continue;
            }
            if self.reactive.len() == REACTIVE_MAX
                && let Some((oldest, _)) = self.reactive.pop_front()
                && self.states[oldest as usize] == State::Wanted
            {
                self.states[oldest as usize] = State::Away;
            }
            self.states[page as usize] = State::Wanted;
            self.reactive.push_back((page, class));
        }
    }

    fn is_planned(&self, page: Page) -> bool {
        (self.places[page as usize] as usize) < self.plan.len()
    }

    fn want_color(&mut self, page: Page) {
        let color = self.color(page);
        let pages = self.windows[color].pages as usize;
        let ahead: Vec<Page> = self.template.space.after(page).take(pages).collect();
        self.want(ahead, Class::Color(color as u8));
    }

    fn want_best(&mut self, page: Page) {
        if self.is_planned(page) {
            let place = self.places[page as usize] as usize;
            let most = if place < self.due { u32::MAX } else { EARLY_WINDOW };
            let pages = self.plan_window.pages.min(most) as usize;
            let ahead: Vec<Page> = self.plan[place + 1..].iter().take(pages).copied().collect();
            self.want(ahead, Class::Plan);
            return;
        }
        if self.follows(page) {
            self.window(Class::Color(self.color(page) as u8)).outrun();
        }
        self.want_color(page);
    }

    /// Whether the page before it in color space was touched, or brought by that color's window: the guest goes through
    /// them in order.
    fn follows(&self, page: Page) -> bool {
        let class = Class::Color(self.color(page) as u8);
        let state = self.template.space.before(page).map(|before| self.states[before as usize]);
        state.is_some_and(|state| state == State::Ahead(class) || state == State::Touched)
    }

    fn count_segment(&mut self, page: Page, pages: u32, faults: u32) {
        let segment = page / pages;
        let count = self.segments.entry(segment).or_default();
        *count += 1;
        if *count == faults.saturating_add(1) {
            let start = segment * pages;
            self.want((start..start.saturating_add(pages)).collect(), Class::Color(0));
        }
    }

    fn drop_wrong_plan(&mut self) {
        let wrong = self.plan_window.asked_total >= PLAN_JUDGED
            && self.plan_window.rate().is_some_and(|r| r < PLAN_WRONG)
            && self.faults_beyond_plan();
        if self.policy == Policy::Auto && wrong {
            self.cursor = self.plan.len();
        }
    }

    /// Whether the guest has shown by faults that it runs, and elsewhere: before it does, nothing can be used.
    fn faults_beyond_plan(&self) -> bool {
        let faults: u64 = self.tallies.iter().map(|t| t.faults).sum();
        faults > self.plan_window.used_total
    }
}

fn window(policy: &Policy, traits: &Traits) -> u32 {
    match policy {
        Policy::Color(Windows { executable, data }) => {
            if traits.executable {
                *executable
            } else {
                *data
            }
        }
        _ => traits.window,
    }
}

/// What is fetched anyhow, in order, and how many of it before the guest runs.
fn plan(template: &Template, policy: &Policy, eager: Eager) -> (Vec<Page>, usize) {
    let stored = |page: &Page| u64::from(*page) < template.stored.len() && template.stored.get((*page).into());
    let recorded = |mask: u32| {
        let mut found: Vec<_> = template.profile.entries().iter().filter(|e| e.recent & mask == mask).collect();
        found.sort_by_key(|e| e.rank);
        found.into_iter().map(|e| e.page).filter(stored).collect::<Vec<Page>>()
    };
    match policy {
        Policy::None | Policy::Readahead(_) | Policy::Color(_) => (Vec::new(), 0),
        Policy::All => (template.stored.iter().map(|page| page as Page).collect(), 0),
        Policy::Twinkle { .. } => {
            let set = recorded(1);
            let first = set.len();
            (set, first)
        }
        Policy::Replay => (recorded(1), 0),
        Policy::Intersect if template.profile.recordings() < 2 => (recorded(1), 0),
        Policy::Intersect => (recorded(0b11), 0),
        Policy::Auto | Policy::Plain => {
            let (plan, usual) = likely(template, eager);
            let places: HashMap<Page, u16> = template.profile.entries().iter().map(|e| (e.page, e.early)).collect();
            let at_once = |page: &&Page| places.get(page).is_some_and(|&early| early < FIRST);
            // Where nothing is recorded, all that is likely may be touched at once.
            let first = match template.profile.recordings() {
                0 => usual.min(FIRST_MAX_UNKNOWN),
                _ => plan.iter().take(FIRST_MAX).take_while(at_once).count(),
            };
            (plan, first)
        }
    }
}

/// The step of time that a page's first touch falls in: two for each doubling.
fn step_of(early: u16) -> usize {
    usize::from(early / STEP)
}

/// Where in a plan in the order of time each of its steps begins, behind the last of which stands what only colors speak
/// for.
fn steps(template: &Template, plan: &[Page]) -> Vec<usize> {
    let early: HashMap<Page, u16> = template.profile.entries().iter().map(|e| (e.page, e.early)).collect();
    let mut steps = Vec::new();
    for (at, page) in plan.iter().enumerate() {
        let Some(early) = early.get(page) else { break };
        while steps.len() <= step_of(*early) {
            steps.push(at);
        }
    }
    steps
}

/// The recorded pages that `wanted` picks and that have content: by how early they are touched, in steps of time, and by
/// address within.
fn in_plan_order(template: &Template, wanted: impl Fn(&Entry) -> bool) -> Vec<Page> {
    let stored = |page: Page| u64::from(page) < template.stored.len() && template.stored.get(page.into());
    let entries = template.profile.entries().iter().filter(|e| stored(e.page) && wanted(e));
    let mut known: Vec<(usize, Page)> = entries.map(|e| (step_of(e.early), e.page)).collect();
    known.sort_unstable();
    known.into_iter().map(|(_, page)| page).collect()
}

/// All pages at least as likely as the dial asks: those recorded, by how early they are touched, in steps of time and by
/// address within (so that a layout in this order is read in large pieces); then those that only their color speaks for.
/// And how many of these pages the dial's usual place asks for, too.
fn likely(template: &Template, eager: Eager) -> (Vec<Page>, usize) {
    let stored = |page: Page| u64::from(page) < template.stored.len() && template.stored.get(page.into());
    if eager.dial() == 0.0 {
        return (Vec::new(), 0);
    }
    let threshold_of = |eager: Eager| match template.profile.recordings() {
        0 => eager.threshold() * UNKNOWN,
        _ => eager.threshold(),
    };
    let (threshold, usual) = (threshold_of(eager), threshold_of(eager).max(threshold_of(Eager::default())));
    let odds = template.profile.odds();
    let mut out = in_plan_order(template, |entry| odds.likelihood(entry) >= threshold);
    let chances = chances(template);
    let mut listed = vec![false; template.stored.len() as usize];
    for &page in &out {
        listed[page as usize] = true;
    }
    let mut rest: Vec<(u32, Page)> = Vec::new();
    // What is left for a full copy is wanted for its own sake and no guess: it comes in large reads, as it lies.
    let mut copied: Vec<Page> = Vec::new();
    for &page in template.space.order() {
        let chance = chances[usize::from(template.space.color(page)) % COLORS];
        if !stored(page) || listed[page as usize] {
            continue;
        }
        if eager.dial() >= 1.0 && chance < usual {
            copied.push(page);
        } else if chance >= threshold {
            rest.push(((1e6 * (1.0 - chance)) as u32, page));
        }
    }
    rest.sort_by_key(|&(unlikely, _)| unlikely);
    let as_usual = rest.partition_point(|&(unlikely, _)| unlikely <= (1e6 * (1.0 - usual)) as u32);
    let as_usual = out.len() + as_usual;
    out.extend(rest.into_iter().map(|(_, page)| page));
    copied.sort_unstable();
    out.extend(copied);
    (out, as_usual)
}

/// By color: how likely an offshoot touches a page that no recording names. With recordings, how often the last one
/// named a page that none before had; without, the color's prior.
fn chances(template: &Template) -> [f32; COLORS] {
    let (mut stored, mut known, mut fresh) = ([0_u64; COLORS], [0_u64; COLORS], [0_u64; COLORS]);
    for page in template.stored.iter() {
        stored[usize::from(template.space.color(page as Page)) % COLORS] += 1;
    }
    for entry in template.profile.entries() {
        let color = usize::from(template.space.color(entry.page)) % COLORS;
        let count = if entry.recent == 1 { &mut fresh } else { &mut known };
        count[color] += 1;
    }
    let recordings = template.profile.recordings();
    std::array::from_fn(|color| {
        let silent = stored[color].saturating_sub(known[color]) as f32;
        match recordings {
            0 => template.traits[color].prior,
            // Of a single recording all pages are new, which says nothing of the next.
            1 => template.traits[color].prior * 0.25,
            _ if silent == 0.0 => 0.0,
            _ => fresh[color] as f32 / silent,
        }
    })
}
