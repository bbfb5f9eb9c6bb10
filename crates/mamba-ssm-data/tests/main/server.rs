//! A web server on loopback that fails on demand.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
#[cfg(feature = "remote")]
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// What to do with a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// As asked.
    Whole,
    /// As asked, but the connection is cut after so many bytes of the body.
    Cut(usize),
    /// This status and no content.
    Status(u16),
    /// The head and some bytes of the body, then nothing, until the client goes away.
    Stall(usize),
    /// All of the file, whatever range is asked for.
    WithoutRanges,
    /// Without ranges, and cut after so many bytes.
    WithoutRangesCut(usize),
    /// As asked, but with one byte changed.
    Altered,
    /// Go to the server on this port of loopback instead.
    #[allow(
        dead_code,
        reason = "downloads alone are redirected, and not every build has them"
    )]
    Redirect(u16),
}

/// A request that came in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    pub method: String,
    /// Below the root, without a slash in front.
    pub path: String,
    /// First byte of the range asked for.
    pub from: Option<usize>,
    /// The value of the `authorization` header.
    pub authorization: Option<String>,
}

type Plan = dyn Fn(&Request, usize) -> Answer + Send + Sync;

/// Serves a folder until it is dropped.
pub struct Server {
    /// `http://127.0.0.1:PORT`
    pub url: String,
    log: Arc<Mutex<Vec<Request>>>,
    listener: TcpListener,
}

impl Server {
    /// Serves the files below `root`; `plan` says how, from the request and how often its path has been
    /// asked for before.
    pub fn start(
        root: &Path,
        plan: impl Fn(&Request, usize) -> Answer + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = Self {
            url: format!("http://{}", listener.local_addr().unwrap()),
            log: Arc::default(),
            listener: listener.try_clone().unwrap(),
        };
        let (log, root, plan): (_, _, Arc<Plan>) =
            (server.log.clone(), root.to_path_buf(), Arc::new(plan));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(stream) = stream else { return };
                let (log, root, plan) = (log.clone(), root.clone(), plan.clone());
                std::thread::spawn(move || {
                    // A client that goes away is no failure of the server.
                    let _ = serve(&stream, &root, &log, &*plan);
                    let _ = stream.shutdown(Shutdown::Both);
                });
            }
        });
        server
    }

    /// The requests so far.
    pub fn requests(&self) -> Vec<Request> {
        self.log.lock().unwrap().clone()
    }

    /// How often something was asked for whose path contains this.
    #[cfg(feature = "remote")]
    pub fn asked(&self, part: &str) -> usize {
        self.requests()
            .iter()
            .filter(|r| r.path.contains(part))
            .count()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        wake(&self.listener);
    }
}

/// Passes connections on to another server, and cuts the first few of them after some bytes of what comes back.
#[cfg(feature = "remote")]
pub struct Cutter {
    /// `http://127.0.0.1:PORT`
    pub url: String,
    listener: TcpListener,
    cuts: Arc<AtomicUsize>,
}

#[cfg(feature = "remote")]
impl Cutter {
    /// In front of the server at this address (`127.0.0.1:PORT`).
    pub fn start(server: &str, connections: usize, bytes: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let cutter = Self {
            url: format!("http://{}", listener.local_addr().unwrap()),
            listener: listener.try_clone().unwrap(),
            cuts: Arc::default(),
        };
        let (cuts, server) = (cutter.cuts.clone(), server.to_string());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(client) = stream else { return };
                let (cuts, server) = (cuts.clone(), server.clone());
                std::thread::spawn(move || {
                    // Either side may go away whenever it likes.
                    let _ = pass_on(&client, &server, &cuts, connections, bytes);
                    let _ = client.shutdown(Shutdown::Both);
                });
            }
        });
        cutter
    }

    /// Connections that have been cut.
    pub fn cuts(&self) -> usize {
        self.cuts.load(Ordering::SeqCst)
    }
}

#[cfg(feature = "remote")]
impl Drop for Cutter {
    fn drop(&mut self) {
        wake(&self.listener);
    }
}

#[cfg(feature = "remote")]
fn pass_on(
    client: &TcpStream,
    server: &str,
    cuts: &AtomicUsize,
    most: usize,
    bytes: u64,
) -> std::io::Result<()> {
    let server = TcpStream::connect(server)?;
    let (mut from, mut to) = (client.try_clone()?, server.try_clone()?);
    std::thread::spawn(move || std::io::copy(&mut from, &mut to));
    let copied = std::io::copy(&mut (&server).take(bytes), &mut &*client)?;
    let cut = |made| (made < most).then_some(made + 1);
    if copied < bytes
        || cuts
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, cut)
            .is_err()
    {
        std::io::copy(&mut &server, &mut &*client)?;
    }
    server.shutdown(Shutdown::Both)
}

/// A last connection wakes the listening thread, which then finds an error.
fn wake(listener: &TcpListener) {
    let _ = listener.set_nonblocking(true);
    let _ = TcpStream::connect(listener.local_addr().unwrap());
}

fn serve(
    stream: &TcpStream,
    root: &Path,
    log: &Mutex<Vec<Request>>,
    plan: &Plan,
) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    let (request, length) = read_head(&mut reader)?;
    // Before any answer: a client that is still writing when the connection closes reports that instead.
    let mut sent = vec![0; length];
    reader.read_exact(&mut sent)?;
    let before = {
        let mut log = log.lock().unwrap();
        let before = log
            .iter()
            .filter(|r| r.path == request.path && r.method == request.method)
            .count();
        log.push(request.clone());
        before
    };
    let answer = plan(&request, before);
    match answer {
        Answer::Status(status) => return head(stream, status, 0, ""),
        Answer::Redirect(port) => {
            let there = format!("Location: http://127.0.0.1:{port}/{}\r\n", request.path);
            return head(stream, 302, 0, &there);
        }
        _ => {}
    }
    if request.method == "PUT" {
        let path = below(root, &request.path);
        std::fs::create_dir_all(path.parent().unwrap())?;
        std::fs::write(path, sent)?;
        return head(stream, 201, 0, "");
    }
    match std::fs::read(below(root, &request.path)) {
        Ok(body) => send(stream, &request, answer, body),
        Err(_) => head(stream, 404, 0, ""),
    }
}

fn read_head(reader: &mut impl BufRead) -> std::io::Result<(Request, usize)> {
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let mut words = line.split_whitespace();
    let mut request = Request {
        method: words.next().unwrap_or_default().into(),
        path: words
            .next()
            .unwrap_or_default()
            .trim_start_matches('/')
            // What some stores' clients escape in a path.
            .replace("%2F", "/")
            .replace("%2E", ".")
            .replace("%2D", "-"),
        from: None,
        authorization: None,
    };
    let mut length = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim().split_once(':') else {
            return Ok((request, length));
        };
        let value = value.trim();
        match name.to_ascii_lowercase().as_str() {
            "content-length" => length = value.parse().unwrap(),
            "authorization" => request.authorization = Some(value.into()),
            "range" => {
                let range = value.strip_prefix("bytes=").unwrap();
                request.from = Some(range.split('-').next().unwrap().parse().unwrap());
            }
            _ => {}
        }
    }
}

fn head(mut stream: &TcpStream, status: u16, length: usize, more: &str) -> std::io::Result<()> {
    write!(
        stream,
        "HTTP/1.1 {status} Words\r\nContent-Length: {length}\r\nConnection: close\r\n\
        ETag: \"1\"\r\nLast-Modified: Tue, 15 Nov 1994 12:45:26 GMT\r\n{more}\r\n"
    )
}

fn send(
    mut stream: &TcpStream,
    request: &Request,
    answer: Answer,
    mut body: Vec<u8>,
) -> std::io::Result<()> {
    let total = body.len();
    let ranges = !matches!(answer, Answer::WithoutRanges | Answer::WithoutRangesCut(_));
    let from = request.from.filter(|_| ranges);
    if answer == Answer::Altered {
        body[total / 2] ^= 1;
    }
    match from {
        Some(from) if from >= total => return head(stream, 416, 0, ""),
        Some(from) => {
            let range = format!("Content-Range: bytes {from}-{}/{total}\r\n", total - 1);
            body.drain(..from);
            head(stream, 206, body.len(), &range)?;
        }
        None => head(stream, 200, body.len(), "")?,
    }
    if request.method == "HEAD" {
        return Ok(());
    }
    let wait = |stream: &TcpStream| (&*stream).read_to_end(&mut Vec::new());
    match answer {
        Answer::Cut(bytes) | Answer::WithoutRangesCut(bytes) => {
            stream.write_all(&body[..bytes.min(body.len())])
        }
        Answer::Stall(bytes) => {
            stream.write_all(&body[..bytes.min(body.len())])?;
            wait(stream).map(drop)
        }
        _ => stream.write_all(&body),
    }
}

/// A path below the root, whatever dots the client sends.
fn below(root: &Path, path: &str) -> PathBuf {
    let plain = path.split('?').next().unwrap_or_default();
    plain
        .split('/')
        .filter(|part| !matches!(*part, "" | "." | ".."))
        .fold(root.into(), |at: PathBuf, part| at.join(part))
}
