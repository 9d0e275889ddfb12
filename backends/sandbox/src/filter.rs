//! Filters of system calls (seccomp(2)): one for the process, and a narrower one for each kind of thread.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, apply_filter, apply_filter_all_threads,
};
use thiserror::Error;

use crate::calls::{Call, Only, REFUSED, SOCK_TYPE_MASK};
use crate::profile::Mode;

/// System calls cannot be filtered.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum FilterError {
    /// The rules make no filter.
    #[error("the filter of system calls cannot be built")]
    Build(#[from] BackendError),
    /// The kernel did not take it.
    #[error("the kernel did not take the filter of system calls (it needs CONFIG_SECCOMP_FILTER)")]
    Install(#[source] seccompiler::Error),
}

/// What a thread does, and needs no more for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum ThreadKind {
    /// Serves a queue of a guest.
    Queue,
    /// Does for queues what would block them.
    Helper,
    /// Talks to a server of storage.
    Server,
    /// Runs a virtual processor.
    Processor,
}

/// What is installed, one after the other: the strictest answer of all holds.
type Programs = Vec<BpfProgram>;

/// Those of the kinds of threads; none if system calls are not restricted.
static THREADS: OnceLock<BTreeMap<ThreadKind, Programs>> = OnceLock::new();

/// The filters of a process.
pub(crate) struct Filters {
    process: Programs,
    threads: BTreeMap<ThreadKind, Programs>,
}

impl Filters {
    pub(crate) fn compile(
        mode: Mode,
        calls: &[Call],
        threads: BTreeMap<ThreadKind, Vec<Call>>,
    ) -> Result<Self, FilterError> {
        Ok(Self {
            process: compile(mode, calls)?,
            threads: threads
                .into_iter()
                .map(|(kind, calls)| Ok((kind, compile(mode, &calls)?)))
                .collect::<Result<_, FilterError>>()?,
        })
    }

    /// Restricts all threads that there are, and remembers what those of a kind are restricted to.
    pub(crate) fn install(self) -> Result<(), FilterError> {
        self.process
            .iter()
            .try_for_each(|filter| apply_filter_all_threads(filter))
            .map_err(FilterError::Install)?;
        // Entered once.
        let _ = THREADS.set(self.threads);
        Ok(())
    }
}

/// Restricts the calling thread, and those that it starts, to what threads of its kind need. Does nothing if system calls
/// are not restricted, or the process's profile does not tell this kind apart.
///
/// # Errors
/// [`FilterError::Install`]: the thread must not go on.
pub fn narrow(kind: ThreadKind) -> Result<(), FilterError> {
    let filters = THREADS.get().and_then(|threads| threads.get(&kind));
    filters
        .into_iter()
        .flatten()
        .try_for_each(|filter| apply_filter(filter))
        .map_err(FilterError::Install)
}

/// The numbers of system calls are this architecture's.
const ARCH: TargetArch = TargetArch::x86_64;

/// A filter that lets pass what is kept, and what is refused; and for each error one that answers with it.
fn compile(mode: Mode, calls: &[Call]) -> Result<Programs, FilterError> {
    let otherwise = match mode {
        Mode::Log => SeccompAction::Log,
        Mode::On | Mode::Strict | Mode::Off => SeccompAction::KillProcess,
    };
    let mut passing = calls.to_vec();
    let mut filters = Programs::new();
    for &(errno, refused) in REFUSED {
        let kept = |refused: &Call| {
            let same = |call: &Call| call.number == refused.number && call.only == Only::Always;
            calls.iter().any(same)
        };
        let refused: Vec<Call> = refused.iter().filter(|call| !kept(call)).copied().collect();
        if refused.is_empty() {
            continue;
        }
        passing.extend(&refused);
        let errno = SeccompAction::Errno(errno.unsigned_abs());
        let filter = SeccompFilter::new(rules(&refused)?, SeccompAction::Allow, errno, ARCH)?;
        filters.push(filter.try_into()?);
    }
    let passing = rules(&passing)?;
    let filter = SeccompFilter::new(passing, otherwise, SeccompAction::Allow, ARCH)?;
    filters.push(filter.try_into()?);
    Ok(filters)
}

/// The rules by number; none for a number means whatever its arguments.
fn rules(calls: &[Call]) -> Result<BTreeMap<i64, Vec<SeccompRule>>, FilterError> {
    let mut rules: BTreeMap<i64, Option<Vec<SeccompRule>>> = BTreeMap::new();
    for call in calls {
        let entry = rules.entry(call.number).or_insert_with(|| Some(Vec::new()));
        match (condition(call.only)?, entry.as_mut()) {
            (Some(rule), Some(rules)) => rules.push(rule),
            (None, _) => *entry = None,
            // Allowed with any arguments already.
            (Some(_), None) => {}
        }
    }
    Ok(rules
        .into_iter()
        .map(|(number, rules)| (number, rules.unwrap_or_default()))
        .collect())
}

fn condition(only: Only) -> Result<Option<SeccompRule>, FilterError> {
    let is = |argument, value| (argument, SeccompCmpOp::Eq, value);
    let has = |argument, mask, value| (argument, SeccompCmpOp::MaskedEq(mask), value);
    let all = match only {
        Only::Always => return Ok(None),
        Only::Is(argument, value) => vec![is(argument, value)],
        Only::Has(argument, mask, value) => vec![has(argument, mask, value)],
        Only::IsWithout(argument, value, mask) => {
            vec![
                is(argument, value),
                has(argument.saturating_add(1), mask, 0),
            ]
        }
        Only::Socket(family, kind, protocol) => {
            let kind = has(1, SOCK_TYPE_MASK, kind);
            vec![is(0, family), kind, is(2, protocol)]
        }
        Only::Own(argument) => vec![is(argument, std::process::id().into())],
    };
    // The kernel looks at 32 bits of all arguments that are told apart here.
    let len = SeccompCmpArgLen::Dword;
    let all = all.into_iter();
    let all = all.map(|(argument, operator, value)| {
        SeccompCondition::new(argument, len.clone(), operator, value)
    });
    Ok(Some(SeccompRule::new(all.collect::<Result<_, _>>()?)?))
}
