//! Filters of system calls (seccomp(2)): one for the process, and a narrower one for each kind of thread.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, apply_filter, apply_filter_all_threads,
};
use thiserror::Error;

use crate::calls::{Call, Only, REFUSED};
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
type Filters = Vec<BpfProgram>;

/// Those of the kinds of threads; empty if the process is not confined.
static THREADS: OnceLock<BTreeMap<ThreadKind, Filters>> = OnceLock::new();

/// Restricts all threads of the process to `calls`, and remembers what threads of a kind are restricted to.
pub(crate) fn install(
    mode: Mode,
    calls: &[Call],
    threads: &BTreeMap<ThreadKind, Vec<Call>>,
) -> Result<(), FilterError> {
    let kinds = threads
        .iter()
        .map(|(kind, calls)| Ok((*kind, compile(mode, calls)?)))
        .collect::<Result<_, FilterError>>()?;
    let filters = compile(mode, calls)?;
    // Entered once.
    let _ = THREADS.set(kinds);
    filters
        .iter()
        .try_for_each(|filter| apply_filter_all_threads(filter))
        .map_err(FilterError::Install)
}

/// Restricts the calling thread, and those that it starts, to what threads of its kind need. Does nothing if the process is not
/// confined, or its profile does not tell this kind apart.
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

/// A filter that lets pass what is kept, and what is refused; and for each refusal one that answers it.
fn compile(mode: Mode, calls: &[Call]) -> Result<Filters, FilterError> {
    let otherwise = match mode {
        Mode::Log => SeccompAction::Log,
        Mode::On | Mode::Off => SeccompAction::KillProcess,
    };
    let mut passing = rules(calls)?;
    let mut filters = Vec::new();
    for &(number, errno) in REFUSED {
        if passing.contains_key(&number) {
            continue;
        }
        passing.insert(number, Vec::new());
        let errno = SeccompAction::Errno(errno.unsigned_abs());
        let only = BTreeMap::from([(number, Vec::new())]);
        let filter = SeccompFilter::new(only, SeccompAction::Allow, errno, ARCH)?;
        filters.push(filter.try_into()?);
    }
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
    let (argument, operator, value) = match only {
        Only::Always => return Ok(None),
        Only::Is(argument, value) => (argument, SeccompCmpOp::Eq, value),
        Only::Has(argument, mask, value) => (argument, SeccompCmpOp::MaskedEq(mask), value),
        Only::Own(argument) => (argument, SeccompCmpOp::Eq, std::process::id().into()),
    };
    // The kernel looks at 32 bits of all arguments that are told apart here.
    let len = SeccompCmpArgLen::Dword;
    let condition = SeccompCondition::new(argument, len, operator, value)?;
    Ok(Some(SeccompRule::new(vec![condition])?))
}
