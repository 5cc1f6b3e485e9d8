use super::*;
use base::Bitmap;
use proptest::prelude::*;
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

const CODE: u8 = 1;
const DATA: u8 = 2;

/// `pages` pages, all stored; odd ones are data, even ones code.
fn template(pages: u32, profile: Profile) -> Arc<Template> {
    let mut stored = Bitmap::new(pages.into());
    stored.set_range(0, pages.into());
    let space = Space::new((0..pages).map(|p| if p % 2 == 0 { CODE } else { DATA }).collect(), |_| (0, 0));
    let mut traits = [Traits { window: 8, executable: false, prior: 0.05 }; COLORS];
    traits[usize::from(CODE)] = Traits { window: 2, executable: true, prior: 0.05 };
    Arc::new(Template { space, traits, stored, profile })
}

fn recording(pages: impl IntoIterator<Item = u32>) -> Vec<Touch> {
    pages.into_iter().enumerate().map(|(i, page)| Touch { page, ms: i as u32 }).collect()
}

fn profile(recordings: &[&[u32]]) -> Profile {
    let mut out = Profile::default();
    for pages in recordings {
        out.add(&recording(pages.iter().copied()), u32::MAX);
    }
    out
}

fn planner(policy: &str, template: Arc<Template>) -> Planner {
    Planner::new(template, policy.parse().unwrap(), Eager::default())
}

fn next(planner: &mut Planner, most: usize) -> Vec<Page> {
    let mut out = Vec::new();
    planner.next(most, &mut out);
    out
}

#[test]
fn policies_read_as_they_are_written() {
    for text in
        ["none", "all", "replay", "intersect", "auto", "auto:plain", "readahead:8", "twinkle:32,2", "color:4,16"]
    {
        assert_eq!(text.parse::<Policy>().unwrap().to_string(), text);
    }
    assert_eq!("color".parse(), Ok(Policy::Color(Windows { executable: 4, data: 16 })));
    for text in ["", "nonsense", "readahead", "readahead:0", "readahead:x", "auto:3", "twinkle:1", "color:1,2,3"] {
        assert!(text.parse::<Policy>().is_err(), "{text} must be refused");
    }
    for text in ["-0.1", "1.1", "x", "nan"] {
        assert!(text.parse::<Eager>().is_err(), "{text} must be refused");
    }
}

#[test]
fn each_policy_asks_for_its_own_pages() {
    let seen = profile(&[&[9, 4, 2], &[4, 9, 7]]);
    // Policy, fault, what is asked for then.
    let cases: &[(&str, u32, &[u32])] = &[
        ("none", 4, &[]),
        ("readahead:3", 4, &[5, 6, 7]),
        ("readahead:3", 18, &[19]),
        ("all", 0, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19]),
        ("replay", 4, &[9, 7]),
        ("intersect", 7, &[4, 9]),
        ("color:1,3", 4, &[6]),
        ("color:1,3", 5, &[7, 9, 11]),
        ("color:1,3", 17, &[19]),
    ];
    for (policy, fault, wanted) in cases {
        let mut planner = planner(policy, template(20, seen.clone()));
        planner.fault(*fault, true);
        assert_eq!(next(&mut planner, 100), *wanted, "{policy} after a fault on {fault}");
        assert_eq!(next(&mut planner, 100), [], "{policy} asks once");
        assert!(planner.is_idle());
    }
}

#[test]
fn a_dial_at_nothing_is_no_prefetch_and_at_all_a_copy_as_it_lies_behind_what_is_likely() {
    let of = |dial: f32| Planner::new(template(40, Profile::default()), Policy::Auto, Eager::new(dial).unwrap());
    let mut least = of(0.0);
    least.fault(5, true);
    assert_eq!((next(&mut least, 100), least.first(), least.is_idle()), (vec![], 0, true));
    // Nothing here is likely enough to be waited for, and all of it is copied in the order in which it lies.
    let mut full = of(1.0);
    assert_eq!((full.first(), next(&mut full, 100)), (0, (0..40).collect()));
    // Data is likely now, and comes first.
    let mut known = (*template(40, Profile::default())).clone();
    known.traits[usize::from(DATA)].prior = 0.9;
    let mut full = Planner::new(Arc::new(known), Policy::Auto, Eager::new(1.0).unwrap());
    let (data, code) = ((0..20).map(|n| 2 * n + 1), (0..20).map(|n| 2 * n));
    assert_eq!((full.first(), next(&mut full, 100)), (20, data.chain(code).collect()));
}

#[test]
fn blind_to_colors_auto_takes_neighbours_by_address() {
    let mut planner = planner("auto:plain", template(4000, Profile::default()));
    planner.fault(100, true);
    assert_eq!(next(&mut planner, 100), (101..109).collect::<Vec<_>>(), "pages of either color");
    assert_eq!(planner.tallies()[crate::Color::Unknown as usize].faults, 1);
}

#[test]
fn what_one_recording_touched_counts_for_as_much_as_its_like_return() {
    // Of 1,000 pages that each recording touches alone, none returns; of 100 that two do, some will.
    let own = |n: u32| (0..1000).map(move |i| 10_000 + n * 1000 + i);
    let mut seen = Profile::default();
    for n in 0..4 {
        let often = (0..500).chain((500..600).filter(|page| page % 4 == n || page % 4 == (n + 1) % 4));
        seen.add(&recording(often.chain(own(n))), u32::MAX);
    }
    let mut planner = planner("auto", template(20_000, seen));
    let asked = next(&mut planner, 20_000);
    assert!((0..600).all(|page| asked.contains(&page)), "what returns is fetched");
    assert!(asked.iter().all(|page| *page < 600), "{} pages, most of them in vain", asked.len());
}

#[test]
fn auto_has_here_first_what_is_touched_at_once() {
    let touches: Vec<Touch> = [(9, 0), (4, 200), (7, 300), (5, 5000)].map(|(page, ms)| Touch { page, ms }).to_vec();
    let mut seen = Profile::default();
    seen.add(&touches, 60_000);
    let mut planner = planner("auto", template(64, seen));
    assert!(planner.adapts());
    assert_eq!(planner.first(), 2);
    assert_eq!(next(&mut planner, 4), [9, 4, 7, 5]);
}

#[test]
fn what_is_touched_late_is_not_fetched_long_before_its_time() {
    let touches: Vec<Touch> = [(9, 0), (4, 5000), (7, 7000), (5, 40_000)].map(|(page, ms)| Touch { page, ms }).to_vec();
    let mut seen = Profile::default();
    seen.add(&touches, 60_000);
    let mut planner = planner("auto", template(64, seen.clone()));
    planner.set_age(Duration::ZERO);
    assert_eq!(next(&mut planner, 8), [9, 4]);
    assert!(!planner.is_idle(), "there is more to come");
    planner.set_age(Duration::from_secs(1));
    assert_eq!(next(&mut planner, 8), [7]);
    planner.set_age(Duration::from_secs(60));
    assert_eq!(next(&mut planner, 8), []);
    planner.set_age(Duration::from_secs(80));
    assert_eq!(next(&mut planner, 8), [5]);
    assert!(planner.is_idle());
    let mut eager = Planner::new(template(64, seen), Policy::Auto, Eager::new(1.0).unwrap());
    eager.set_age(Duration::ZERO);
    assert_eq!(next(&mut eager, 100).len(), 64, "a full copy waits for nothing");
}

#[test]
fn a_guest_that_is_ahead_of_those_recorded_brings_time_forward_and_chance_does_not() {
    let late = (100..1000).map(|page| Touch { page, ms: 30_000 });
    let mut seen = Profile::default();
    seen.add(&[Touch { page: 9, ms: 0 }].into_iter().chain(late).collect::<Vec<_>>(), 60_000);
    let mut planner = planner("auto", template(3000, seen));
    planner.set_age(Duration::ZERO);
    assert_eq!(next(&mut planner, 3000), [9]);
    planner.fault(100, true);
    assert_eq!(next(&mut planner, 3000), (101..117).collect::<Vec<_>>(), "a few that are next, whatever it was");
    let between = |asked: &[Page]| (100..1000).filter(|page| page % 25 == 24 && asked.contains(page)).count();
    (125..600).step_by(25).for_each(|page| planner.fault(page, true));
    planner.set_age(Duration::ZERO);
    assert_eq!(between(&next(&mut planner, 3000)), 0, "twenty waits are chance");
    (600..1000).step_by(25).for_each(|page| planner.fault(page, true));
    planner.set_age(Duration::ZERO);
    assert_eq!(between(&next(&mut planner, 3000)), 36, "nearly forty are not, and bring all that is late");
}

#[test]
fn twinkle_brings_the_working_set_first_and_then_segments() {
    let mut planner = planner("twinkle:8,2", template(64, profile(&[&[40, 3, 41]])));
    assert_eq!(planner.first(), 3);
    assert_eq!(next(&mut planner, 3), [40, 3, 41]);
    for page in [16, 17] {
        planner.fault(page, true);
        assert_eq!(next(&mut planner, 100), []);
    }
    planner.fault(23, true);
    assert_eq!(next(&mut planner, 100), [18, 19, 20, 21, 22], "the third fault of its segment");
}

#[test]
fn auto_follows_the_plan_from_where_the_guest_is() {
    let pages: Vec<u32> = (100..400).collect();
    let mut planner = planner("auto", template(1000, profile(&[&pages, &pages])));
    planner.fault(300, true);
    let asked = next(&mut planner, 100);
    assert_eq!(asked[..64], (301..365).collect::<Vec<_>>(), "what follows in the plan goes first");
    assert_eq!(asked[64..], (100..136).collect::<Vec<_>>(), "then the plan from its start");
    assert!(asked.iter().all(|p| pages.contains(p)), "nothing that was never touched");
}

#[test]
fn auto_takes_colors_where_the_plan_is_silent_and_adapts() {
    let mut planner = planner("auto", template(4000, Profile::default()));
    planner.fault(1, true);
    assert_eq!(next(&mut planner, 100), [3, 5, 7, 9, 11, 13, 15, 17], "a window of its color");
    // The guest walks on through all data pages: the window must come to cover more at each fault.
    let (mut faults, mut here) = (0, HashSet::from([1, 3, 5, 7, 9, 11, 13, 15, 17]));
    for page in (3..2000).step_by(2) {
        if here.insert(page) {
            faults += 1;
            planner.fault(page, true);
        } else {
            planner.used(page);
        }
        here.extend(next(&mut planner, 1000));
        planner.judge();
    }
    assert!(faults < 20, "{faults} faults on 1000 pages in order");
    // Now it jumps: what the windows bring is wasted, and they must shrink.
    let before: u64 = planner.tallies().iter().map(|t| t.prefetched).sum();
    for page in (2001..4000).step_by(66) {
        planner.fault(page, true);
        next(&mut planner, 1000);
        planner.judge();
    }
    let brought = planner.tallies().iter().map(|t| t.prefetched).sum::<u64>() - before;
    assert!(brought < 31 * 40, "{brought} pages brought for 31 faults without neighbours");
}

#[test]
fn auto_guesses_only_where_faults_are_dear() {
    let seen: Vec<u32> = (10..20).collect();
    let mut planner = planner("auto", template(4000, profile(&[&seen])));
    assert_eq!(next(&mut planner, 100), seen);
    planner.fault(1000, false);
    assert_eq!(next(&mut planner, 100), []);
    planner.fault(2000, true);
    assert_eq!(next(&mut planner, 100), [2002, 2004]);
}

#[test]
fn a_plan_that_proves_wrong_is_dropped() {
    let pages: Vec<u32> = (0..8000).collect();
    let mut planner = planner("auto", template(20_000, profile(&[&pages])));
    let mut asked = 0;
    for fault in (8001..20_000).step_by(3) {
        planner.fault(fault, true);
        asked += next(&mut planner, 16).iter().filter(|p| **p < 8000).count();
    }
    assert!((1024..2000).contains(&asked), "{asked} pages of a wrong plan were fetched");
}

#[test]
fn the_dial_goes_from_nothing_to_everything() {
    let seen = profile(&[&[1, 2, 3], &[1, 2], &[1]]);
    let asked = |dial: f32| {
        let mut planner = Planner::new(template(50, seen.clone()), Policy::Auto, Eager::new(dial).unwrap());
        next(&mut planner, 1000)
    };
    assert_eq!(asked(0.0), []);
    assert_eq!(asked(0.1), [1]);
    assert_eq!(asked(0.2), [1, 2]);
    assert_eq!(asked(0.5), [1, 2, 3]);
    let mut last = 0;
    for step in 0..=10_u8 {
        let now = asked(f32::from(step) / 10.0).len();
        assert!(now >= last, "more eager brings less at {step}");
        last = now;
    }
    let mut all = asked(1.0);
    all.sort_unstable();
    assert_eq!(all, (0..50).collect::<Vec<_>>());
}

#[test]
fn only_pages_with_content_are_asked_for() {
    for policy in ["all", "replay", "readahead:50", "color:50,50", "auto", "twinkle:50,1"] {
        let mut holey = (*template(50, profile(&[&(0..50).collect::<Vec<_>>()]))).clone();
        holey.stored = Bitmap::new(50);
        holey.stored.set_range(10, 20);
        let mut planner = planner(policy, Arc::new(holey));
        for page in [0, 1, 2] {
            planner.fault(page, true);
        }
        assert!(next(&mut planner, 1000).iter().all(|p| (10..20).contains(p)), "{policy}");
    }
}

#[test]
fn profiles_remember_and_forget() {
    let mut profile = profile(&[&[5, 6]]);
    for _ in 0..31 {
        profile.add(&recording([6, 7]), u32::MAX);
    }
    assert_eq!((profile.recordings(), profile.len()), (32, 3));
    profile.add(&recording([6, 7]), u32::MAX);
    assert_eq!((profile.recordings(), profile.len()), (32, 2), "page 5 was not touched in 32 recordings");
}

#[test]
fn a_recording_that_ended_early_says_nothing_of_what_comes_late() {
    let mut profile = Profile::default();
    let at = |pages: &[(u32, u32)]| pages.iter().map(|&(page, ms)| Touch { page, ms }).collect::<Vec<_>>();
    profile.add(&at(&[(1, 10), (2, 9_000)]), 60_000);
    (0..3).for_each(|_| profile.add(&at(&[(1, 10), (3, 20)]), 1_000));
    let likely = |profile: &Profile, page: u32| {
        profile.odds().likelihood(profile.entries().iter().find(|e| e.page == page).expect("it is known"))
    };
    assert!(likely(&profile, 1) > 0.9 && likely(&profile, 2) > 0.8, "{}", likely(&profile, 2));
    assert!(likely(&profile, 3) < 0.8, "the first went long enough to have seen it");
    profile.add(&at(&[(1, 10)]), 60_000);
    assert!(likely(&profile, 2) < 0.6, "one that went as long did without it");
    assert_eq!(Profile::decode(&profile.encode()).unwrap(), profile);
}

#[test]
fn the_further_the_store_the_less_of_a_window_must_be_used() {
    // Every fifth page that follows in its color is used.
    let faults = |cost: Option<f32>| {
        let mut planner = planner("auto", template(8000, Profile::default()));
        planner.set_cost(cost);
        let (mut faults, mut here) = (0, HashSet::new());
        for page in (1..8000).step_by(10) {
            if here.contains(&page) {
                planner.used(page);
            } else {
                faults += 1;
                planner.fault(page, true);
            }
            here.extend(next(&mut planner, 1000));
            planner.judge();
        }
        faults
    };
    let (unknown, near, far) = (faults(None), faults(Some(0.1)), faults(Some(0.002)));
    assert_eq!(unknown, near);
    assert!(far * 3 < near, "{far} faults where a page costs little, {near} where it costs much");
}

#[test]
fn a_working_set_settles_where_doubling_the_time_adds_little() {
    let burst: Vec<u32> = (0..1000).map(|i| i / 2).chain((0..10).map(|i| 600 + i * 100)).collect();
    assert_eq!(settled(&burst, 4000), Some(500));
    assert_eq!(settled(&burst, 700), None, "not seen for long enough");
    let growing: Vec<u32> = (0..10_000).collect();
    assert_eq!(settled(&growing, 10_000), None);
    assert_eq!(settled(&[], 100_000), None);
    assert_eq!(settled(&[u32::MAX], u32::MAX), None);
}

#[test]
fn pace_fills_the_link_and_gives_way() {
    let ms = Duration::from_millis;
    let mut pace = Pace::default();
    // A link of 125 MB a second, 20 ms away, that serves one piece after another: 2.5 MB fill it.
    let (piece, serial) = (64_u64 << 10, Duration::from_secs_f64(65536.0 / 125e6));
    let (mut now, mut free_at, mut sent) = (Duration::ZERO, Duration::ZERO, 0_u64);
    let mut flying: std::collections::VecDeque<(Duration, Duration)> = std::collections::VecDeque::new();
    while now < Duration::from_secs(9) {
        while (flying.len() as u64 + 1) * piece <= pace.allowed() {
            free_at = free_at.max(now) + serial;
            flying.push_back((now, free_at + ms(20)));
        }
        let (asked, came) = flying.pop_front().unwrap();
        now = came;
        sent += piece;
        pace.arrived(now, now - asked, piece);
    }
    let used = sent as f64 / (9.0 * 125e6);
    assert!(used > 0.9, "{used} of the link was used");
    let allowed = pace.allowed() as f64 / 2.5e6;
    assert!((1.0..2.5).contains(&allowed), "{allowed} times what fills the link is under way");
    pace.demand(ms(20));
    let before = pace.allowed();
    pace.demand(ms(80));
    assert!(pace.allowed() < before * 3 / 4, "demand suffers, and prefetch goes on as before");
    (0..100).for_each(|_| pace.demand(ms(80)));
    let least = pace.allowed() as f64 / 2.5e6;
    assert!((0.4..0.7).contains(&least), "{least} of what fills the link: that makes no queue, however slow demand is");
}

proptest! {
    #[test]
    fn profiles_come_back_as_they_were_written(recordings in prop::collection::vec(prop::collection::vec(0_u32..5000, 0..200), 0..40)) {
        let mut profile = Profile::default();
        for pages in &recordings {
            profile.add(&recording(pages.iter().copied()), u32::MAX);
        }
        prop_assert_eq!(Profile::decode(&profile.encode()), Ok(profile));
    }

    #[test]
    fn no_bytes_make_a_profile_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..400), headed: bool) {
        if headed {
            bytes.splice(0..0, *b"OFFPROF1");
        }
        if let Ok(profile) = Profile::decode(&bytes) {
            let mut planner = planner("auto", template(100, profile.clone()));
            prop_assert!(next(&mut planner, 1000).iter().all(|p| *p < 100));
            prop_assert_eq!(Profile::decode(&profile.encode()), Ok(profile));
        }
    }

    #[test]
    fn templates_come_back_as_they_were_written(
        pages in prop::collection::vec((0_u8..4, 0_u64..5, any::<bool>()), 0..300),
        seen in prop::collection::vec(0_u32..300, 0..50),
        cut in 0_usize..2000,
        flip in 1_u8..=255,
    ) {
        let mut stored = Bitmap::new(pages.len() as u64);
        for (page, _) in pages.iter().enumerate().filter(|(_, p)| p.2) {
            stored.set(page as u64);
        }
        let space = Space::new(pages.iter().map(|p| p.0).collect(), |page| (pages[page as usize].1, 0));
        let traits = template(1, Profile::default()).traits;
        let written = Template { space, traits, stored, profile: profile(&[&seen]) };
        let mut bytes = written.encode();
        let read = Template::decode(&bytes, traits).unwrap();
        prop_assert_eq!(read.space.order(), written.space.order());
        prop_assert!((0..pages.len() as u32).all(|p| read.space.color(p) == written.space.color(p)));
        prop_assert_eq!((&read.stored, &read.profile), (&written.stored, &written.profile));
        // What is damaged is refused, or is some template: never a panic.
        let at = cut % bytes.len();
        let _ = Template::decode(&bytes[..at], traits);
        bytes[at] ^= flip;
        if let Ok(read) = Template::decode(&bytes, traits) {
            next(&mut planner("auto", Arc::new(read)), 1000);
        }
    }

    #[test]
    fn no_page_is_asked_for_twice(faults in prop::collection::vec(0_u32..600, 0..400), policy in 0_usize..8) {
        let policy = ["none", "readahead:7", "all", "twinkle:16,2", "replay", "intersect", "color", "auto"][policy];
        let seen: Vec<u32> = (0..500).step_by(3).collect();
        let mut planner = planner(policy, template(500, profile(&[&seen, &seen[20..]])));
        let mut asked = HashSet::new();
        for (i, fault) in faults.iter().enumerate() {
            planner.fault(*fault, true);
            planner.used(fault.wrapping_mul(7) % 500);
            for page in next(&mut planner, i % 5) {
                prop_assert!(asked.insert(page), "page {} twice under {}", page, policy);
            }
            if i % 10 == 0 {
                planner.judge();
            }
        }
    }
}
