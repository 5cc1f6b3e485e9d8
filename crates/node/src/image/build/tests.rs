use super::*;

#[test]
fn only_debian_entries_of_the_suite_are_taken_over() {
    let taken = [
        ("http://deb.example/debian/ bookworm main", Some("deb http://deb.example/debian/ bookworm main")),
        ("https://d.example/s bookworm-security main", Some("deb https://d.example/s bookworm-security main")),
        ("http://d.example/debian bookworm-updates main", Some("deb http://d.example/debian bookworm-updates main")),
    ];
    for (target, entry) in taken {
        assert_eq!(source_line(target).as_deref(), entry);
    }
    for target in [
        "http://d.example/debian trixie main",
        "http://d.example/debian bookworm-backports main",
        "http://d.example/debian bookworm contrib",
        "https://user:secret@d.example/debian bookworm main",
        "file:/srv/mirror bookworm main",
        "",
    ] {
        assert_eq!(source_line(target), None, "{target}");
    }
}

#[test]
fn a_build_is_named_by_what_goes_into_it() {
    let small = BuildOptions { size: 1 << 30, force: false };
    let forced = BuildOptions { size: 1 << 30, force: true };
    let sources = vec!["deb http://a bookworm main".to_owned()];
    assert_eq!(key(&small, &sources), key(&forced, &sources), "forcing does not change what is built");
    assert_ne!(key(&small, &sources), key(&BuildOptions::default(), &sources));
    assert_ne!(key(&small, &sources), key(&small, &[]));
}
