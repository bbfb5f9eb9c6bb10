//! From a file to chunks of whole lines, decompressed on a thread of its own.

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use flate2::read::MultiGzDecoder;

use crate::{Error, Result};

/// Bytes of one chunk of lines.
const CHUNK: usize = 2 << 20;
/// Chunks that wait between the reading thread and the parser.
const WAITING: usize = 4;
/// The longest line that is taken for a row.
pub(super) const LONGEST_LINE: usize = 1 << 16;

/// What a file's first bytes say it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Text,
    Gzip,
    Zip,
    Parquet,
}

impl Format {
    /// What an error calls it.
    fn name(self) -> &'static str {
        match self {
            Format::Text => "text",
            Format::Gzip => "gzip",
            Format::Zip => "zip",
            Format::Parquet => "Parquet",
        }
    }
}

/// Tells the formats apart by their first bytes.
pub(super) fn detect(path: &Path) -> Result<Format> {
    let file = open(path)?;
    let mut magic = [0u8; 4];
    let read = read_full(&mut &file, &mut magic).map_err(|e| Error::io(path, "read it", e))?;
    Ok(match &magic[..read] {
        [0x1f, 0x8b, ..] => Format::Gzip,
        [b'P', b'K', 3 | 5, 4 | 6] => Format::Zip,
        b"PAR1" => Format::Parquet,
        _ => Format::Text,
    })
}

/// Opens a file; a folder is refused in words.
pub(super) fn open(path: &Path) -> Result<File> {
    let file = File::open(path).map_err(|e| Error::io(path, "open it", e))?;
    let meta = file
        .metadata()
        .map_err(|e| Error::io(path, "read its size", e))?;
    if meta.is_dir() {
        return Err(Error::Source {
            path: path.display().to_string(),
            reason: "this is a folder; expected a file".into(),
        });
    }
    Ok(file)
}

/// Whole lines of a file. Memory: at most [`WAITING`] + 2 chunks, however large the file.
pub(super) struct Chunks {
    name: String,
    format: Format,
    receiver: Receiver<Result<Vec<u8>>>,
    /// Asked how it ended when nothing more comes.
    thread: Option<JoinHandle<()>>,
    consumed: Arc<AtomicU64>,
}

impl Chunks {
    /// Opens a file and starts to read it.
    pub(super) fn open(path: &Path, format: Format) -> Result<Self> {
        let consumed = Arc::new(AtomicU64::new(0));
        let raw = Counting {
            inner: open(path)?,
            count: consumed.clone(),
        };
        let name = path.display().to_string();
        Self::spawn(path, format, consumed, move |sender| match format {
            Format::Gzip => {
                let inner = MultiGzDecoder::new(BufReader::with_capacity(1 << 18, raw));
                send_chunks(inner, &name, "gzip", sender);
            }
            Format::Zip => send_zip(BufReader::with_capacity(1 << 18, raw), &name, sender),
            Format::Text | Format::Parquet => send_chunks(raw, &name, "text", sender),
        })
    }

    /// Runs the reading side on a thread of its own.
    fn spawn(
        path: &Path,
        format: Format,
        consumed: Arc<AtomicU64>,
        read: impl FnOnce(&SyncSender<Result<Vec<u8>>>) + Send + 'static,
    ) -> Result<Self> {
        let (sender, receiver) = sync_channel(WAITING);
        let thread = std::thread::Builder::new()
            .name("read-lines".into())
            .spawn(move || read(&sender))
            .map_err(|e| Error::io(path, "start a reading thread", e))?;
        Ok(Self {
            name: path.display().to_string(),
            format,
            receiver,
            thread: Some(thread),
            consumed,
        })
    }

    /// The next whole lines; `None` at the end.
    pub(super) fn next(&mut self) -> Result<Option<Vec<u8>>> {
        if let Ok(outcome) = self.receiver.recv() {
            return outcome.map(Some);
        }
        // A decoder that panicked has not come to the end of the file.
        match self.thread.take().map(JoinHandle::join) {
            Some(Err(_)) => Err(Error::Damaged {
                path: self.name.clone(),
                format: self.format.name(),
                reason: "the reader gave up on its content".into(),
            }),
            _ => Ok(None),
        }
    }

    /// Bytes of the file (compressed, if it is) read so far.
    pub(super) fn bytes_read(&self) -> u64 {
        self.consumed.load(Ordering::Relaxed)
    }
}

/// Sends the lines of the one table in a zip archive.
fn send_zip(reader: impl Read + Seek, name: &str, out: &SyncSender<Result<Vec<u8>>>) {
    let damaged = |reason: String| Error::Damaged {
        path: name.into(),
        format: "zip",
        reason,
    };
    let mut archive = match zip::ZipArchive::new(reader) {
        Ok(archive) => archive,
        Err(e) => {
            let _ = out.send(Err(damaged(e.to_string())));
            return;
        }
    };
    let is_table = |n: &String| {
        let lower = n.to_ascii_lowercase();
        lower.ends_with(".csv") || lower.ends_with(".txt")
    };
    let names = archive
        .file_names()
        .map(|n| n.map(String::from))
        .collect::<std::result::Result<Vec<_>, _>>();
    let tables: Vec<String> = match names {
        Ok(names) => names.into_iter().filter(is_table).collect(),
        Err(e) => {
            let _ = out.send(Err(damaged(e.to_string())));
            return;
        }
    };
    let [table] = &tables[..] else {
        let reason = format!("it holds {} .csv files; expected one", tables.len());
        let _ = out.send(Err(damaged(reason)));
        return;
    };
    match archive.by_name(table) {
        Ok(file) => send_chunks(file, name, "zip", out),
        Err(e) => {
            let _ = out.send(Err(damaged(e.to_string())));
        }
    }
}

struct Counting<R> {
    inner: R,
    count: Arc<AtomicU64>,
}

impl<R: Read> Read for Counting<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.count.fetch_add(read as u64, Ordering::Relaxed);
        Ok(read)
    }
}

impl<R: Seek> Seek for Counting<R> {
    fn seek(&mut self, to: SeekFrom) -> std::io::Result<u64> {
        self.inner.seek(to)
    }
}

/// Cuts the stream at line ends and sends it on until it ends, fails, or nobody listens.
fn send_chunks(
    mut reader: impl Read,
    name: &str,
    format: &'static str,
    out: &SyncSender<Result<Vec<u8>>>,
) {
    let mut rest: Vec<u8> = Vec::new();
    let mut lines = 0u64;
    loop {
        let mut chunk = std::mem::take(&mut rest);
        let held = chunk.len();
        chunk.resize(held + CHUNK, 0);
        let read = match read_full(&mut reader, &mut chunk[held..]) {
            Ok(read) => read,
            Err(e) => {
                let _ = out.send(Err(Error::Damaged {
                    path: name.into(),
                    format,
                    reason: format!("{e} (behind row {lines})"),
                }));
                return;
            }
        };
        chunk.truncate(held + read);
        let at_end = read < CHUNK;
        let cut = if at_end {
            chunk.len()
        } else {
            chunk.iter().rposition(|&b| b == b'\n').map_or(0, |i| i + 1)
        };
        if chunk.len() - cut > LONGEST_LINE {
            lines += count_lines(&chunk[..cut]);
            let _ = out.send(Err(Error::LineTooLong {
                path: name.into(),
                row: lines + 1,
                limit: LONGEST_LINE,
            }));
            return;
        }
        rest.extend_from_slice(&chunk[cut..]);
        chunk.truncate(cut);
        lines += count_lines(&chunk);
        let empty = chunk.is_empty();
        if (!empty && out.send(Ok(chunk)).is_err()) || at_end {
            return;
        }
    }
}

/// Number of line ends.
fn count_lines(bytes: &[u8]) -> u64 {
    bytes.iter().filter(|&&b| b == b'\n').count() as u64
}

/// Fills the buffer unless the stream ends first; returns the bytes read.
fn read_full(reader: &mut impl Read, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match reader.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_decoder_that_panics_is_not_the_end_of_the_file() {
        let count = Arc::new(AtomicU64::new(0));
        let path = Path::new("candles.zip");
        let mut chunks = Chunks::spawn(path, Format::Zip, count, |out| {
            out.send(Ok(b"60,1\n".to_vec())).unwrap();
            panic!("as a decoder may on bytes that nobody has tried");
        })
        .unwrap();
        assert_eq!(chunks.next().unwrap().unwrap(), b"60,1\n");
        let message = chunks.next().unwrap_err().to_string();
        assert!(
            message.contains("candles.zip") && message.contains("as zip"),
            "{message}"
        );
    }
}
