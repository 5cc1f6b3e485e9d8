//! Commands of other stores, and of cleaning up.

use super::{GcArgs, Outcome, TransferArgs, WarmArgs, output};
use api::{
    Client, Credentials, GcReply, GcRequest, Moved, RemoteRequest, Stored, TransferRequest, WarmReply, WarmRequest,
};
use base::units::human;

/// Which way.
#[derive(Clone, Copy)]
pub(super) enum Way {
    Push,
    Pull,
}

/// Moves images, snapshots and blobs.
pub(super) fn transfer(client: &Client, way: Way, args: &TransferArgs) -> Outcome {
    let request = TransferRequest {
        store: place(&args.store)?,
        names: args.names.clone(),
        force: args.force,
        credentials: credentials(),
    };
    let path = match way {
        Way::Push => "/v1/push",
        Way::Pull => "/v1/pull",
    };
    let mut show = output::Show::new();
    let moved: Vec<Moved> = client.post_long(path, &request, |p| show.update(p))?;
    drop(show);
    if args.json {
        output::json(&moved);
        return Ok(());
    }
    for m in &moved {
        println!("{}", m.name);
        eprintln!(
            "{}: {} blocks compared, {} sent; the store grew by {}",
            m.name,
            m.blocks_read,
            m.blocks_sent,
            human(m.stored_bytes)
        );
    }
    Ok(())
}

/// Lists what another store has.
pub(super) fn remote(client: &Client, store: &str, json: bool) -> Outcome {
    let request = RemoteRequest { store: place(store)?, credentials: credentials() };
    let found: Vec<Stored> = client.post("/v1/remote", &request)?;
    if json {
        output::json(&found);
    } else {
        let rows: Vec<_> = found.iter().map(|s| vec![s.name.clone(), human(s.logical_bytes)]).collect();
        output::table(&["NAME", "SIZE"], &rows);
    }
    Ok(())
}

/// Cleans up.
pub(super) fn gc(client: &Client, args: &GcArgs) -> Outcome {
    let request = GcRequest {
        dry_run: args.dry_run,
        keep_last: args.keep_last,
        keep_within_s: args.keep_within.map(|within| within.as_secs()),
        drop_node: args.drop_node.clone(),
        store: args.store.as_deref().map(place).transpose()?,
        credentials: credentials(),
    };
    let reply: GcReply = client.post("/v1/gc", &request)?;
    if args.json {
        output::json(&reply);
        return Ok(());
    }
    let would = |did: &str, would: &str| if args.dry_run { would.to_owned() } else { did.to_owned() };
    for name in &reply.dropped {
        println!("{} {name}", would("dropped", "would drop"));
    }
    if args.dry_run && !reply.nodes.is_empty() {
        let row = |n: &api::GcNode| {
            let this = if n.this { " (this one)" } else { "" };
            vec![format!("{}{this}", n.id), n.host.clone(), n.home.clone(), n.heads.to_string(), n.seen.clone()]
        };
        let rows: Vec<_> = reply.nodes.iter().map(row).collect();
        output::table(&["NODE", "HOST", "HOME", "KEEPS", "LAST STARTED"], &rows);
    }
    if args.dry_run {
        let row =
            |p: &api::GcPack| vec![p.pack.clone(), human(p.bytes), human(p.kept_bytes), p.fate.clone(), p.why.clone()];
        output::table(&["PACK", "SIZE", "REACHED", "FATE", "WHY"], &reply.packs.iter().map(row).collect::<Vec<_>>());
    }
    let later = match reply.bytes_later {
        0 => String::new(),
        bytes => format!("; {} more when its time of grace is over", human(bytes)),
    };
    println!("{} {}{later}", would("gave back", "would give back"), human(reply.bytes));
    Ok(())
}

/// Fetches into the node's cache.
pub(super) fn warm(client: &Client, args: &WarmArgs) -> Outcome {
    let request = WarmRequest { names: args.names.clone(), pin: args.pin, unpin: args.unpin };
    let mut show = output::Show::new();
    let warmed: Vec<WarmReply> = client.post_long("/v1/warm", &request, |p| show.update(p))?;
    drop(show);
    if args.json {
        output::json(&warmed);
        return Ok(());
    }
    for w in warmed {
        println!("{}", w.name);
        if !args.unpin {
            eprintln!("{}: {} in the cache, {} fetched", w.name, human(w.bytes), human(w.fetched_bytes));
        }
    }
    Ok(())
}

/// The place of a store as the daemon, which has a directory of its own, understands it.
fn place(store: &str) -> Result<String, Box<dyn std::error::Error>> {
    if store.contains("://") {
        return Ok(store.to_owned());
    }
    let path = std::path::absolute(store).map_err(|e| format!("{store}: {e}"))?;
    path.into_os_string().into_string().map_err(|p| format!("{} is not UTF-8", p.to_string_lossy()).into())
}

/// Whoever asks signs, where the environment says with what; the daemon may be older than this shell.
fn credentials() -> Option<Credentials> {
    let set = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    Some(Credentials {
        key_id: set("AWS_ACCESS_KEY_ID")?,
        secret: set("AWS_SECRET_ACCESS_KEY")?,
        token: set("AWS_SESSION_TOKEN"),
    })
}
