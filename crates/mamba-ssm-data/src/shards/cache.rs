//! Pages that have been read, as many as fit.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::ShardReader;
use super::read::Page;
use crate::Result;

/// Keeps the pages that were used last, within a number of bytes.
#[derive(Debug)]
pub(crate) struct PageCache {
    reader: Arc<ShardReader>,
    capacity: AtomicUsize,
    kept: Mutex<Kept>,
    /// One lock per page, so that a page is read once however many threads want it.
    reading: Vec<Mutex<()>>,
}

#[derive(Debug, Default)]
struct Kept {
    pages: HashMap<usize, (Arc<Page>, u64)>,
    clock: u64,
}

impl PageCache {
    pub(crate) fn new(reader: Arc<ShardReader>, capacity: usize) -> Self {
        let reading = (0..reader.pages()).map(|_| Mutex::default()).collect();
        Self {
            reader,
            capacity: AtomicUsize::new(capacity),
            kept: Mutex::default(),
            reading,
        }
    }

    /// Changes how many bytes are kept.
    pub(crate) fn set_capacity(&self, bytes: usize) {
        self.capacity.store(bytes, Ordering::Relaxed);
    }

    /// Rows of a page.
    pub(crate) fn page_rows(&self) -> usize {
        self.reader.page_rows()
    }

    /// Says that a page will be wanted soon.
    pub(crate) fn prefetch(&self, page: usize) {
        self.reader.prefetch(page);
    }

    /// The shard that a page lies in.
    pub(crate) fn shard_of(&self, page: usize) -> usize {
        self.reader.shard_of(page)
    }

    /// Number of shards.
    pub(crate) fn shards(&self) -> usize {
        self.reader.manifest.shards.len()
    }

    /// Bytes of a page in memory.
    pub(crate) fn page_bytes(&self) -> usize {
        self.page_rows() * (4 * self.reader.manifest.transform.width() + 1)
    }

    /// A page, from memory or read now.
    pub(crate) fn page(&self, index: usize) -> Result<Arc<Page>> {
        if let Some(page) = self.find(index) {
            return Ok(page);
        }
        let _reading = lock(&self.reading[index]);
        if let Some(page) = self.find(index) {
            return Ok(page);
        }
        let page = Arc::new(self.reader.page(index)?);
        let mut kept = lock(&self.kept);
        let room = (self.capacity.load(Ordering::Relaxed) / self.page_bytes()).max(1);
        while kept.pages.len() >= room {
            let oldest = kept
                .pages
                .iter()
                .min_by_key(|(_, (_, used))| *used)
                .map(|(i, _)| *i);
            match oldest {
                Some(oldest) => kept.pages.remove(&oldest),
                None => break,
            };
        }
        kept.clock += 1;
        let now = kept.clock;
        kept.pages.insert(index, (page.clone(), now));
        Ok(page)
    }

    fn find(&self, index: usize) -> Option<Arc<Page>> {
        let mut kept = lock(&self.kept);
        kept.clock += 1;
        let now = kept.clock;
        let (page, used) = kept.pages.get_mut(&index)?;
        *used = now;
        Some(page.clone())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
