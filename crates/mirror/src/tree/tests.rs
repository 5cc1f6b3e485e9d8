use super::*;

fn home() -> (tempfile::TempDir, Home) {
    let dir = tempfile::tempdir().unwrap();
    let home = Home::prepare_for_boot(dir.path(), "test").unwrap();
    home.reset_live().unwrap();
    (dir, home)
}

fn version(blob: &str, number: u64) -> Node {
    let version = format!("{blob}-{number}");
    Node::Version(VersionNode { blob: blob.to_owned(), number, version, size: 8192, time_ms: 7 })
}

fn place(overlay: u64, blob: &str, number: u64) -> FilePlace {
    FilePlace { overlay, blob: blob.to_owned(), number }
}

#[test]
fn names_of_blobs_and_directories_are_one_to_one() {
    for blob in ["disk", "team/data", "a/b/c", "we.ird+@:1"] {
        assert_eq!(blob_of(&directory_of(blob)).as_deref(), Some(blob));
        assert!(!directory_of(blob).contains('/'));
    }
    for none in ["a%2f", "%", "a%20b", "a/b"] {
        assert_eq!(blob_of(none), None, "{none}");
    }
}

#[test]
fn a_mirror_that_takes_over_knows_inodes_handles_and_files_and_one_of_another_session_does_not() {
    let (_dir, home) = home();
    let tree = Tree::open(home.clone(), false).unwrap();
    let (one, two) = (tree.enter(version("b", 1)).unwrap(), tree.enter(version("b", 2)).unwrap());
    assert_eq!(tree.enter(version("b", 1)).unwrap(), one);
    assert!(matches!(tree.open_as(70, one, false).unwrap(), Opened::Done));
    assert!(matches!(tree.open_as(72, two, true).unwrap(), Opened::Needs(v) if v.number == 2));
    tree.set_files(vec![place(900, "b", 2)]).unwrap();
    assert!(tree.open_file(72, 900).unwrap() && !tree.open_file(74, 901).unwrap());
    // Readers meet what was written, once there is a mirrored file.
    assert!(matches!(tree.open_as(76, two, false).unwrap(), Opened::Done));
    tree.close(76);
    drop(tree);
    let next = Tree::open(home.clone(), true).unwrap();
    assert_eq!((next.target(70), next.target(72)), (Some(Target::Version(one)), Some(Target::Overlay(900))));
    assert_eq!(next.target(76), None);
    assert_eq!(next.node(two), Some(version("b", 2)));
    // The kernel sends an opening again: it is counted once.
    assert!(matches!(next.open_as(72, two, true).unwrap(), Opened::Done));
    let opens = next.opens();
    assert_eq!(opens.overlays, [(900, 1)]);
    assert_eq!(opens.versions.iter().map(|v| (v.node, v.number)).collect::<Vec<_>>(), [(one, 1)]);
    assert!(next.enter(version("c", 0)).unwrap() > two, "numbers of inodes are not used again");
    let fresh = Tree::open(home, false).unwrap();
    assert_eq!((fresh.target(70), fresh.node(one)), (None, None));
}

#[test]
fn what_is_barred_cannot_be_opened_and_what_is_open_or_changed_is_not_retired() {
    let (_dir, home) = home();
    let tree = Tree::open(home.clone(), false).unwrap();
    let (one, two) = (tree.enter(version("b", 1)).unwrap(), tree.enter(version("b", 2)).unwrap());
    tree.open_as(10, one, false).unwrap();
    assert_eq!(tree.bar("b", Some(1)).versions.len(), 1);
    assert!(matches!(tree.open_as(12, one, false).unwrap(), Opened::Gone));
    assert!(matches!(tree.open_as(14, two, false).unwrap(), Opened::Done));
    tree.bar("b", None);
    assert!(matches!(tree.open_as(16, two, false).unwrap(), Opened::Gone));
    tree.lift(Some(("b".to_owned(), None)));
    assert!(matches!(tree.open_as(16, two, false).unwrap(), Opened::Done));
    tree.lift(None);
    assert!(matches!(tree.open_as(12, one, false).unwrap(), Opened::Done));

    tree.set_files(vec![place(900, "b", 2), place(901, "b", 1)]).unwrap();
    tree.open_file(18, 900).unwrap();
    assert!(!tree.retire(900, || true).unwrap(), "it is open");
    tree.close(18);
    assert!(!tree.retire(900, || false).unwrap(), "it is changed");
    assert!(tree.retire(900, || true).unwrap());
    assert!(tree.retire(900, || true).unwrap(), "said again, it is the same");
    assert!(matches!(tree.open_as(20, two, true).unwrap(), Opened::Needs(_)));
    // So it is for the mirror that takes over: what was withdrawn may be removed by then.
    drop(tree);
    let next = Tree::open(home, true).unwrap();
    assert!(matches!(next.open_as(20, two, true).unwrap(), Opened::Needs(_)));
    assert!(matches!(next.open_as(22, one, true).unwrap(), Opened::Done));
    assert_eq!(next.target(22), Some(Target::Overlay(901)));
}

#[test]
fn the_record_stays_short_however_much_is_opened_and_forgotten() {
    let (_dir, home) = home();
    let tree = Tree::open(home.clone(), false).unwrap();
    let kept = tree.enter(version("kept", 0)).unwrap();
    for n in 1..20_000 {
        let node = tree.enter(version("b", n)).unwrap();
        tree.open_as(n * 2, node, false).unwrap();
        tree.close(n * 2);
        tree.forget(node, 1);
    }
    let lines = std::fs::read_to_string(home.live().join("tree.log")).unwrap().lines().count();
    assert!(lines < 5_000, "{lines} lines");
    // A line that a kill cut short says nothing.
    std::fs::OpenOptions::new()
        .append(true)
        .open(home.live().join("tree.log"))
        .and_then(|mut f| std::io::Write::write_all(&mut f, b"{\"open\":{\"han"))
        .unwrap();
    let next = Tree::open(home, true).unwrap();
    assert_eq!(next.node(kept), Some(version("kept", 0)));
    assert_eq!(next.state().nodes.len(), 1);
}

mod fuzz {
    use super::*;
    use crate::edits::{SMALL, within};

    #[test]
    fn records() {
        let (_dir, home) = home();
        let tree = Tree::open(home.clone(), false).unwrap();
        let (one, two) = (tree.enter(version("b", 1)).unwrap(), tree.enter(version("we.ird+@:1", u64::MAX)).unwrap());
        tree.open_as(70, one, false).unwrap();
        tree.open_as(72, two, true).unwrap();
        tree.open_file(72, 900).unwrap();
        tree.close(70);
        tree.forget(one, 1);
        drop(tree);
        let valid = std::fs::read(home.live().join("tree.log")).unwrap();
        fuzz!(vec![valid], |bytes, _| {
            let dir = tempfile::tempdir_in("/dev/shm").unwrap();
            let home = Home::prepare_for_boot(dir.path(), "test").unwrap();
            home.reset_live().unwrap();
            std::fs::write(home.live().join("tree.log"), bytes).unwrap();
            match within(64 * bytes.len() + SMALL, || Tree::open(home.clone(), true)) {
                // What was taken over is what the next one takes over.
                Ok(tree) => {
                    let known = |tree: &Tree| {
                        let state = tree.state();
                        let mut nodes: Vec<_> =
                            state.nodes.iter().map(|(id, known)| (*id, known.node.clone())).collect();
                        nodes.sort_by_key(|(id, _)| *id);
                        (nodes, state.handles.len(), state.next)
                    };
                    let before = known(&tree);
                    drop(tree);
                    assert_eq!(known(&Tree::open(home, true).unwrap()), before);
                }
                Err(error) => assert!(!error.to_string().is_empty()),
            }
        });
    }
}
