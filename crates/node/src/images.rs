//! Images, as the node serves them.

use crate::error::Result;
use crate::image::{self, BuildOptions, ImportOptions, Kind, Parts};
use crate::node::Node;
use crate::{names, sweep};
use api::{BuildRequest, Image, ImportRequest};
use std::path::{Path, PathBuf};

/// Environment: directory in which builds of the default guest are kept, where several homes share one.
pub const ENV_CACHE: &str = "OFFSHOOT_CACHE";

/// Bytes of the default guest's disk.
const DISK_BYTES: u64 = 2 << 30;

type Progress<'a> = &'a mut dyn FnMut(&str, u64, u64);

impl Node {
    /// The images.
    ///
    /// # Errors
    /// Where the store cannot read one.
    pub fn images(&self) -> Result<Vec<Image>> {
        image::list(&self.shared.store)
    }

    /// An image.
    ///
    /// # Errors
    /// Where there is none of that name.
    pub fn image(&self, name: &str) -> Result<serde_json::Value> {
        Ok(serde_json::to_value(image::inspect(&self.shared.store, name)?).expect("wire types serialise"))
    }

    /// Removes an image; VMs booted from it run on.
    ///
    /// # Errors
    /// Where there is none of that name.
    pub fn remove_image(&self, name: &str) -> Result<()> {
        image::remove(&self.shared.store, name)?;
        sweep::sweep(&self.shared)
    }

    /// Builds the default guest.
    ///
    /// # Errors
    /// What kept it from being built, or the name is taken.
    pub fn build_image(&self, request: &BuildRequest, progress: Progress<'_>) -> Result<Image> {
        self.name_is_free(&request.name)?;
        let cache = std::env::var_os(ENV_CACHE).map_or_else(|| self.shared.home.path("work/builds"), PathBuf::from);
        let options = BuildOptions { size: DISK_BYTES, force: request.force };
        let parts = image::build_default(&cache, &options, &mut |step| progress(step, 0, 0))?;
        self.add_image(&request.name, &parts, progress)
    }

    /// Imports a disk or a root file system.
    ///
    /// # Errors
    /// What is refused in it, and why; or the name is taken.
    pub fn import_image(&self, request: &ImportRequest, progress: Progress<'_>) -> Result<Image> {
        self.name_is_free(&request.name)?;
        let options = ImportOptions {
            kind: Kind::Auto,
            kernel: request.kernel.clone().map(PathBuf::from),
            initrd: request.initrd.clone().map(PathBuf::from),
            cmdline: request.cmdline.clone(),
            size: request.size,
            ..ImportOptions::default()
        };
        let work = self.shared.home.path("work/imports");
        let parts = image::import(Path::new(&request.path), &options, &work, &mut |step| progress(step, 0, 0))?;
        self.add_image(&request.name, &parts, progress)
    }

    fn add_image(&self, name: &str, parts: &Parts, progress: Progress<'_>) -> Result<Image> {
        let added = image::add(&self.shared.store, name, parts, &mut |step| progress(step, 0, 0));
        if added.is_err() && !self.shared.is_shared() {
            // What was written before it failed is garbage; a full disk is wanted back now.
            let _ = self.shared.store.collect();
        }
        Ok(added?.describe())
    }

    /// Long work must not begin under a name that is taken or cannot be.
    fn name_is_free(&self, name: &str) -> Result<()> {
        names::check("image", name)?;
        if image::list(&self.shared.store)?.iter().any(|i| i.name == name) {
            return Err(crate::Error::Conflict(format!(
                "an image named {name} is there already; `offshoot image rm {name}` or choose another name"
            )));
        }
        Ok(())
    }
}
