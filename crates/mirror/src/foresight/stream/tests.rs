use super::*;
use base::Bitmap;
use guest::plan::{Eager, Policy, Profile, Space, Template, Touch, traits};
use std::sync::Arc;

const PAGES: u32 = 4096;
/// A color whose windows are wide: user data.
const DATA: u8 = 9;

/// A stream of a template of which these pages are known to be touched, half a second after its start.
fn stream(policy: &str, touched: &[Page]) -> Stream {
    let mut profile = Profile::default();
    let touches: Vec<Touch> = touched.iter().map(|&page| Touch { page, ms: 500 }).collect();
    profile.add(&touches, u32::MAX);
    let mut stored = Bitmap::new(PAGES.into());
    stored.set_range(0, PAGES.into());
    let space = Space::new(vec![DATA; PAGES as usize], |_| (0, 0));
    let template = Template { space, traits: traits(), stored, profile };
    let planner = Planner::new(Arc::new(template), policy.parse().unwrap_or(Policy::None), Eager::default());
    Stream::new(planner, RamMap::zero(u64::from(PAGES) * PAGE))
}

fn arrived(stream: &Stream, pages: &[Page]) {
    stream.arrived(pages, (Duration::from_millis(1), true), &Ok(pages.len() as u64 * PAGE));
}

#[test]
fn pages_are_sorted_before_they_are_fetched_and_what_a_fault_calls_for_goes_first() {
    let touched: Vec<Page> = (0..200).map(|n| n * 3).collect();
    let stream = stream("auto", &touched);
    let Some(Work::Sort(batch)) = stream.take() else { panic!("a batch is sorted first") };
    assert_eq!(batch.len(), 64, "as long as nothing is known of the link");
    assert_eq!(stream.take(), None, "one batch is sorted at a time, and nothing is ready");
    let groups: Vec<Vec<Page>> = batch.chunks(16).map(<[Page]>::to_vec).collect();
    stream.sorted(&batch, Ok(groups.clone()));
    assert_eq!(stream.take(), Some(Work::Fetch(groups[0].clone())));
    assert_eq!(stream.flying(), 16 * PAGE);
    // A fault far from the plan: the next pages of its color, sorted at once, before what is ready.
    assert!(stream.fault(3000, Duration::from_millis(5), true));
    let Some(Work::Sort(urgent)) = stream.take() else { panic!("what a fault calls for is sorted at once") };
    assert!(urgent.starts_with(&[3001, 3002]), "{urgent:?}");
    assert_eq!(stream.take(), Some(Work::Fetch(groups[1].clone())), "others fetch meanwhile");
    stream.sorted(&urgent, Ok(vec![urgent.clone()]));
    assert_eq!(stream.take(), Some(Work::Fetch(urgent.clone())));
    for pages in [&groups[0], &groups[1], &urgent] {
        arrived(&stream, pages);
    }
    assert_eq!((stream.flying(), stream.is_idle()), (0, false));
}

#[test]
fn a_guest_waits_for_its_working_set_however_it_is_grouped_and_not_for_what_is_lost() {
    let touched: Vec<Page> = (0..100).map(|n| n * 7).collect();
    let stream = stream("twinkle:64,4", &touched);
    let (mut asked, mut lost) = (0, 0);
    while let Some(work) = stream.take() {
        match work {
            Work::Sort(pages) if lost == 0 => {
                lost = pages.len();
                stream.sorted(&pages, Err("the store is away".to_owned()));
            }
            Work::Sort(pages) => stream.sorted(&pages, Ok(vec![pages.clone()])),
            Work::Fetch(pages) => {
                asked += pages.len();
                arrived(&stream, &pages);
            }
        }
    }
    assert_eq!(asked + lost, 100);
    stream.await_first();
    assert!(stream.is_idle());
    assert_eq!((stream.stats(7).failed, stream.stats(7).fetched_bytes), (1, asked as u64 * PAGE));
}
