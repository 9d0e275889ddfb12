//! The control thread's event loop: signals, the end of the machine, and whatever devices wait for.
//! Nothing on a data path passes through here; in steady state the thread sleeps.

use std::collections::HashMap;
use std::io;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Registry, Token, Waker};

/// What a [`Handler`] wants next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// To be called again at the next event.
    Continue,
    /// To be removed from the loop and dropped.
    Remove,
}

/// Called on the control thread when its file descriptor has an event.
///
/// Events are edge-triggered: the handler reads until it would block, from a non-blocking file
/// descriptor. The descriptor must stay open until the handler is dropped.
pub type Handler = Box<dyn FnMut() -> Next + Send>;

const WAKE: Token = Token(0);

struct Shared {
    registry: Registry,
    state: Mutex<State>,
    waker: Waker,
}

struct State {
    next: usize,
    stopped: bool,
    handlers: HashMap<Token, (RawFd, Option<Handler>)>,
}

/// Adds handlers to the loop, from any thread.
#[derive(Clone)]
pub struct LoopHandle(Arc<Shared>);

/// Names a handler that was added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HandlerId(Token);

impl LoopHandle {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `handler` whenever `fd` becomes readable, its peer hangs up, or it has an error.
    /// Also once at the start if that is already so.
    pub fn add(&self, fd: RawFd, handler: Handler) -> io::Result<HandlerId> {
        let token = {
            let mut state = self.state();
            let token = Token(state.next);
            state.next += 1;
            // Before the registration: its first event may come at once.
            state.handlers.insert(token, (fd, Some(handler)));
            token
        };
        let registered = self
            .0
            .registry
            .register(&mut SourceFd(&fd), token, Interest::READABLE);
        if let Err(error) = registered {
            self.state().handlers.remove(&token);
            return Err(error);
        }
        Ok(HandlerId(token))
    }

    /// Removes a handler. If it is running right now on the control thread, it is dropped when it
    /// returns.
    pub fn remove(&self, id: HandlerId) {
        let removed = self.state().handlers.remove(&id.0);
        if let Some((fd, _)) = removed {
            // It may have been closed already; then epoll has forgotten it.
            let _ = self.0.registry.deregister(&mut SourceFd(&fd));
        }
    }

    /// Makes [`EventLoop::run`] return.
    pub fn stop(&self) {
        self.state().stopped = true;
        if let Err(error) = self.0.waker.wake() {
            tracing::error!(%error, "cannot wake the control thread");
        }
    }
}

/// The loop itself; owned by the control thread.
pub struct EventLoop {
    poll: Poll,
    handle: LoopHandle,
}

impl EventLoop {
    /// A loop without handlers. Fails if the process has no file descriptor left.
    pub fn new() -> io::Result<Self> {
        let poll = Poll::new()?;
        let registry = poll.registry().try_clone()?;
        let waker = Waker::new(&registry, WAKE)?;
        let state = State {
            next: WAKE.0 + 1,
            stopped: false,
            handlers: HashMap::new(),
        };
        let handle = LoopHandle(Arc::new(Shared {
            registry,
            state: Mutex::new(state),
            waker,
        }));
        Ok(Self { poll, handle })
    }

    /// A handle for devices.
    pub fn handle(&self) -> LoopHandle {
        self.handle.clone()
    }

    /// Serves events until [`LoopHandle::stop`], of which one call ends one run.
    pub fn run(&mut self) -> io::Result<()> {
        self.serve(None)?;
        self.handle.state().stopped = false;
        Ok(())
    }

    fn serve(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        let mut events = Events::with_capacity(64);
        while !self.handle.state().stopped {
            match self.poll.poll(&mut events, timeout) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            }
            for event in events.iter() {
                self.dispatch(event.token());
            }
            if timeout.is_some() && events.is_empty() {
                break;
            }
        }
        Ok(())
    }

    fn dispatch(&self, token: Token) {
        // Taken out while it runs, so that it can add and remove handlers itself.
        let handler = {
            let mut state = self.handle.state();
            state
                .handlers
                .get_mut(&token)
                .and_then(|(_, handler)| handler.take())
        };
        let Some(mut handler) = handler else { return };
        let next = handler();
        if next == Next::Remove {
            self.handle.remove(HandlerId(token));
        } else if let Some((_, place)) = self.handle.state().handlers.get_mut(&token) {
            *place = Some(handler);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    #[test]
    fn handlers_are_called_and_removed() {
        let mut events = EventLoop::new().unwrap();
        let handle = events.handle();
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let (count, reader) = (Arc::new(AtomicUsize::new(0)), event.try_clone().unwrap());
        let seen = count.clone();
        let handler = move || {
            reader.read().unwrap();
            if seen.fetch_add(1, Ordering::Relaxed) == 1 {
                Next::Remove
            } else {
                Next::Continue
            }
        };
        handle.add(event.as_raw_fd(), Box::new(handler)).unwrap();
        for expected in [1, 2, 2] {
            event.write(1).unwrap();
            events.serve(Some(Duration::from_millis(20))).unwrap();
            assert_eq!(count.load(Ordering::Relaxed), expected);
        }
    }

    #[test]
    fn a_handler_may_stop_the_loop_and_remove_itself() {
        let mut events = EventLoop::new().unwrap();
        let handle = events.handle();
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        event.write(1).unwrap();
        let inner = handle.clone();
        let id = Arc::new(Mutex::new(None));
        let own = id.clone();
        let handler = move || {
            if let Some(id) = *own.lock().unwrap() {
                inner.remove(id);
            }
            inner.stop();
            Next::Continue
        };
        *id.lock().unwrap() = Some(handle.add(event.as_raw_fd(), Box::new(handler)).unwrap());
        events.run().unwrap();
        assert!(handle.state().handlers.is_empty());
    }

    #[test]
    fn stop_from_another_thread_wakes_the_loop() {
        let mut events = EventLoop::new().unwrap();
        let handle = events.handle();
        for _ in 0..2 {
            let handle = handle.clone();
            let stopper = std::thread::spawn(move || handle.stop());
            events.run().unwrap();
            stopper.join().unwrap();
        }
    }
}
