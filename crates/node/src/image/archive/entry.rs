//! One entry of a tar archive, with the extended headers (GNU long names, PAX records) that precede it applied.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Component, Path, PathBuf};
use tar::EntryType;

/// The most bytes of extended header that one entry may have.
const EXTENSION_MAX: u64 = 1 << 20;
/// The longest path the kernel takes.
const PATH_MAX: usize = 4095;

/// What an entry makes.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    Directory,
    /// Kept as it stands, wherever it points.
    Symlink(Vec<u8>),
    /// To another entry, by its cleaned path.
    HardLink(PathBuf),
    Fifo,
    CharDevice(u32, u32),
    BlockDevice(u32, u32),
}

/// An entry that may be unpacked, as far as its header can tell.
#[derive(Debug)]
pub(super) struct Entry {
    /// Relative, without `.` and `..`; empty for the root itself.
    pub(super) path: PathBuf,
    pub(super) kind: Kind,
    /// Bytes of contents.
    pub(super) size: u64,
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: i64,
    pub(super) xattrs: Vec<(String, Vec<u8>)>,
}

/// Extended headers seen since the last entry.
#[derive(Debug, Default)]
pub(super) struct Extensions {
    name: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    records: BTreeMap<String, Vec<u8>>,
}

impl Extensions {
    /// Takes in `raw` where it is an extended header; says whether it was one.
    pub(super) fn take<R: Read>(&mut self, raw: &mut tar::Entry<'_, R>) -> Result<bool, String> {
        match raw.header().entry_type() {
            EntryType::GNULongName => self.name = Some(text(raw)?),
            EntryType::GNULongLink => self.link = Some(text(raw)?),
            EntryType::XHeader => {
                let bytes = contents(raw)?;
                for record in tar::PaxExtensions::new(&bytes) {
                    let record = record.map_err(|e| format!("a corrupt PAX header: {e}"))?;
                    let key = record.key().map_err(|e| format!("a corrupt PAX header: {e}"))?;
                    self.records.insert(key.to_owned(), record.value_bytes().to_vec());
                }
            }
            EntryType::XGlobalHeader => drop(contents(raw)?),
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// The name of `raw` as people see it.
    pub(super) fn name_of<R: Read>(&self, raw: &tar::Entry<'_, R>) -> String {
        String::from_utf8_lossy(&self.path_bytes(raw)).into_owned()
    }

    fn path_bytes<R: Read>(&self, raw: &tar::Entry<'_, R>) -> Vec<u8> {
        let given = self.records.get("path").or(self.name.as_ref());
        given.cloned().unwrap_or_else(|| raw.header().path_bytes().into_owned())
    }

    fn number<T: std::str::FromStr>(&self, key: &str) -> Result<Option<T>, String> {
        let Some(bytes) = self.records.get(key) else { return Ok(None) };
        let text = std::str::from_utf8(bytes).ok().map(|t| t.split('.').next().unwrap_or(t));
        text.and_then(|t| t.parse().ok()).map(Some).ok_or_else(|| format!("its PAX record `{key}` is not a number"))
    }
}

fn contents<R: Read>(raw: &mut tar::Entry<'_, R>) -> Result<Vec<u8>, String> {
    let size = raw.header().entry_size().map_err(|e| e.to_string())?;
    if size > EXTENSION_MAX {
        return Err(format!("an extended header of {size} bytes"));
    }
    let mut bytes = Vec::new();
    raw.read_to_end(&mut bytes).map_err(|e| e.to_string())?;
    if bytes.len() as u64 == size { Ok(bytes) } else { Err("the archive ends within a header".to_owned()) }
}

/// A long name: its bytes up to the first NUL.
fn text<R: Read>(raw: &mut tar::Entry<'_, R>) -> Result<Vec<u8>, String> {
    let mut bytes = contents(raw)?;
    bytes.truncate(bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len()));
    Ok(bytes)
}

impl Entry {
    /// The entry of header `raw` and the extended headers before it; else what is wrong with it.
    pub(super) fn new<R: Read>(raw: &tar::Entry<'_, R>, extensions: Extensions) -> Result<Self, String> {
        let header = raw.header();
        let numeric = |e: std::io::Error| format!("a corrupt header: {e}");
        let size = header.entry_size().map_err(numeric)?;
        if extensions.number::<u64>("size")?.is_some_and(|pax| pax != size) {
            return Err("files over 8 GiB are not supported".to_owned());
        }
        let path = clean(&extensions.path_bytes(raw))?;
        let link = || {
            let given = extensions.records.get("linkpath").or(extensions.link.as_ref()).cloned();
            let bytes = given.or_else(|| header.link_name_bytes().map(|b| b.into_owned())).unwrap_or_default();
            let fits = !bytes.is_empty() && bytes.len() <= PATH_MAX && !bytes.contains(&0);
            if fits { Ok(bytes) } else { Err("a link without a usable target".to_owned()) }
        };
        let device = || match (header.device_major(), header.device_minor()) {
            (Ok(Some(major)), Ok(Some(minor))) => Ok((major, minor)),
            _ => Err("a device without numbers".to_owned()),
        };
        let kind = match header.entry_type() {
            // Version 7 archives mark a directory by a slash at the end of its name only.
            EntryType::Regular if header.path_bytes().ends_with(b"/") => Kind::Directory,
            EntryType::Regular | EntryType::Continuous => Kind::File,
            EntryType::Directory => Kind::Directory,
            EntryType::Symlink => Kind::Symlink(link()?),
            EntryType::Link => Kind::HardLink(clean(&link()?).map_err(|why| format!("a hard link: {why}"))?),
            EntryType::Fifo => Kind::Fifo,
            EntryType::Char => device().map(|(major, minor)| Kind::CharDevice(major, minor))?,
            EntryType::Block => device().map(|(major, minor)| Kind::BlockDevice(major, minor))?,
            EntryType::GNUSparse => return Err(SPARSE.to_owned()),
            other => return Err(format!("an entry of unknown type `{}`", other.as_byte().escape_ascii())),
        };
        if extensions.records.keys().any(|key| key.starts_with("GNU.sparse.")) {
            return Err(SPARSE.to_owned());
        }
        if kind != Kind::Directory && path.as_os_str().is_empty() {
            return Err("it would replace the root directory".to_owned());
        }
        let id = |given: Option<u32>, header: std::io::Result<u64>| match given.map_or(header, |id| Ok(u64::from(id))) {
            Ok(id) if id < u64::from(u32::MAX) => Ok(id as u32),
            _ => Err("an owner that is no user or group number".to_owned()),
        };
        Ok(Self {
            size,
            mode: header.mode().map_err(numeric)? & 0o7777,
            uid: id(extensions.number("uid")?, header.uid())?,
            gid: id(extensions.number("gid")?, header.gid())?,
            mtime: extensions.number("mtime")?.unwrap_or(header.mtime().map_err(numeric)? as i64),
            xattrs: xattrs(extensions.records),
            path,
            kind,
        })
    }
}

const SPARSE: &str = "sparse entries are not supported; make the archive without `--sparse`";

fn xattrs(records: BTreeMap<String, Vec<u8>>) -> Vec<(String, Vec<u8>)> {
    let named = |(key, value): (String, Vec<u8>)| Some((key.strip_prefix("SCHILY.xattr.")?.to_owned(), value));
    records.into_iter().filter_map(named).collect()
}

/// A path beneath the root, cleaned of `.`; refused where it says otherwise.
pub(super) fn clean(bytes: &[u8]) -> Result<PathBuf, String> {
    use std::os::unix::ffi::OsStrExt as _;
    let path = Path::new(std::ffi::OsStr::from_bytes(bytes));
    if bytes.is_empty() || bytes.contains(&0) || bytes.len() > PATH_MAX {
        return Err("a path that is empty, too long or holds a NUL".to_owned());
    }
    let mut out = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => out.push(name),
            Component::CurDir => {}
            Component::ParentDir => return Err(format!("`..` in the path `{}`", path.display())),
            Component::RootDir | Component::Prefix(_) => {
                return Err(format!("the absolute path `{}`", path.display()));
            }
        }
    }
    Ok(out)
}
