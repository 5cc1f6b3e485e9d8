use super::*;
use crate::prefetch::servers::Driven;

fn judged(case: &'static str, server: Server, blocked: u64, answers_s: Vec<f64>) -> Judged {
    let driven = Driven { first_s: answers_s.first().copied().unwrap_or(1.0), answers_s, ..Driven::default() };
    let seen = Seen { blocked, driven, fetched_bytes: blocked * 1000, touched_bytes: 10_000, ..Seen::default() };
    Judged { case, server, seen }
}

/// Every case of every server, with faults that `blocked` tells.
fn all(blocked: impl Fn(&str, Server) -> u64) -> Vec<Judged> {
    let servers = |(case, ..): (&'static str, &str, bool)| Server::USUAL.map(|server| (case, server));
    let each = UNTRAINED.into_iter().chain(TRAINED).flat_map(servers);
    each.map(|(case, server)| judged(case, server, blocked(case, server), vec![1.0])).collect()
}

fn value(figures: &[Figure], name: &str) -> f64 {
    figures.iter().find(|figure| figure.figure == name).map_or(f64::NAN, |figure| figure.value)
}

#[test]
fn each_figure_is_judged_by_the_worst_server_and_against_the_best_other_policy() {
    let figures = figures(&all(|case, server| match (case, server) {
        ("none" | "none untrained", _) => 100,
        ("auto", Server::Redis) => 5,
        ("auto", _) => 2,
        ("replay", Server::Web) => 1,
        ("auto untrained", Server::Postgres) => 60,
        ("auto untrained", _) => 20,
        ("plain untrained", _) => 40,
        _ => 50,
    }));
    assert!((value(&figures, "blocking_trained") - 0.05).abs() < 1e-9);
    assert!((value(&figures, "blocking_untrained") - 0.6).abs() < 1e-9);
    assert!((value(&figures, "faults_vs_best") - 2.0).abs() < 1e-9, "replay was better on the web");
    assert!((value(&figures, "color_gain") - 0.5).abs() < 1e-9, "the middle one of 0.5, 1.5, 0.5");
    assert!((value(&figures, "mirrored_over_touched") - 0.5).abs() < 1e-9);
}

#[test]
fn seconds_are_slow_until_answers_come_as_fast_as_all_local() {
    let at_rate = |from: u32, to: u32| (from * 10..=to * 10).map(|n| f64::from(n) / 10.0).collect::<Vec<_>>();
    let mut found = Vec::new();
    for server in Server::USUAL {
        found.push(judged("all-local", server, 0, at_rate(0, 6)));
        found.push(judged("none", server, 9, at_rate(3, 9)));
    }
    let (slow, lost) = slow_seconds(&found, "none");
    assert_eq!((slow, lost), (vec![3.0; 3], vec![3.0; 3]));
    assert_eq!(slow_seconds(&found, "all-local").0, [0.0; 3]);
}
