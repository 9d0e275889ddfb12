//! A lab: the side where guests run, connected, and the files of its run.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::ValueEnum;

use crate::error::{LabError, Result};
use crate::l1::{self, Run};
use crate::link::Link;
use crate::power_cut;
use crate::probe;
use crate::programs;
use crate::protocol::{Event, Request};
use crate::setup::Systems;
use crate::site::{Place, SITE_VARIABLE, Site};

/// Until `lab inside` on this machine is ready.
const HOST_LIMIT: Duration = Duration::from_secs(20);

/// Where guests run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Where {
    /// On this machine if its KVM boots Linux, else in the lab VM
    Auto,
    /// On this machine
    Host,
    /// In the lab VM
    Lab,
}

/// All that a lab needs to start.
#[derive(Debug)]
pub struct Prepared {
    place: Place,
    programs: PathBuf,
    /// What the lab VM gets.
    memory_mib: u64,
    run: Run,
    systems: Arc<Systems>,
}

impl Prepared {
    /// Builds the programs and prepares as many lab VMs as said, or as this machine has processors and memory for, `most` at
    /// most. Guests on this machine's own KVM have one lab.
    ///
    /// # Errors
    /// Fails if the programs cannot be built, or guests cannot run at the place that is wanted.
    pub fn several(
        systems: Systems,
        wanted: Where,
        count: Option<usize>,
        most: usize,
    ) -> Result<Vec<Self>> {
        let programs = build_programs()?;
        let systems = Arc::new(systems);
        let first = Run::create(&systems, 0)?;
        let place = choose(wanted, &systems, &programs, &first)?;
        let (count, memory_mib) = match place {
            Place::Host => (1, 0),
            Place::Lab => l1::shares(count, most)?,
        };
        let mut runs = vec![first];
        for number in 1..count {
            runs.push(Run::create(&systems, number)?);
        }
        let prepared = |run| Self {
            place,
            programs: programs.clone(),
            memory_mib,
            run,
            systems: Arc::clone(&systems),
        };
        Ok(runs.into_iter().map(prepared).collect())
    }

    /// Starts the lab; it ends with the thread that started it, at the latest.
    ///
    /// # Errors
    /// Fails if it does not come up.
    pub fn start(self) -> Result<Lab> {
        let start = Instant::now();
        let link = self.connect()?;
        eprintln!("lab: ready after {:.1} s", start.elapsed().as_secs_f64());
        Ok(Lab {
            link,
            prepared: self,
        })
    }

    fn connect(&self) -> Result<Link> {
        let (run, programs) = (&self.run, &self.programs);
        match self.place {
            Place::Host => host_link(&self.systems.host_site(programs, run.path()), programs, run),
            Place::Lab => l1::boot(&self.systems, run, programs, self.memory_mib),
        }
    }
}

/// A connected lab.
#[derive(Debug)]
pub struct Lab {
    // Fields are dropped in this order: the other side ends before its files go.
    link: Link,
    prepared: Prepared,
}

impl Lab {
    /// Builds the programs and starts one.
    ///
    /// # Errors
    /// As [`Prepared::several`] and [`Prepared::start`].
    pub fn start(systems: Systems, wanted: Where) -> Result<Self> {
        let one = Prepared::several(systems, wanted, None, 1)?;
        let none = || LabError::Setup("no lab was asked for".into());
        one.into_iter().next().ok_or_else(none)?.start()
    }

    /// Sends a request and gives each event of the answer to `show`; returns the status it ended with.
    ///
    /// # Errors
    /// As [`Link::request`].
    pub fn request(
        &mut self,
        request: &Request,
        silence_limit: Duration,
        show: impl FnMut(&Event),
    ) -> Result<i32> {
        self.link.request(request, silence_limit, show)
    }

    /// Ends the other side in the middle of whatever it does, and starts it anew.
    ///
    /// # Errors
    /// As [`Prepared::start`].
    pub fn restart(&mut self) -> Result<()> {
        self.link.cut()?;
        self.link = self.prepared.connect()?;
        Ok(())
    }

    /// Cuts the power of the lab VM while a guest writes, and looks for what was on its disks; gives what there is to say.
    ///
    /// # Errors
    /// Fails if something is missing, or the lab VM does not come up again.
    pub fn cut_power(&mut self) -> Result<String> {
        if self.prepared.place == Place::Host {
            return Err(LabError::Skipped("this machine's power is not cut".into()));
        }
        let told = power_cut::wait_for_writes(&mut self.link)?;
        self.restart()?;
        power_cut::compare(&told, &mut self.link)
    }
}

/// Builds the programs under test; gives the directory they are in.
///
/// # Errors
/// Fails if cargo does.
pub fn build_programs() -> Result<PathBuf> {
    eprintln!("lab: building the programs (static, release)");
    programs::build()
}

/// Starts `lab inside` on this machine.
fn host_link(site: &Site, programs: &Path, run: &Run) -> Result<Link> {
    let mut command = Command::new(programs.join("lab"));
    let site = serde_json::to_string(site).map_err(|error| LabError::Protocol {
        from: "host",
        text: error.to_string(),
    })?;
    command.arg("inside").env(SITE_VARIABLE, site);
    let log = run.path().join("inside.log");
    Link::start("lab program beside KVM", command, &log, &[], HOST_LIMIT)
}

/// Decides where guests run, and says so.
fn choose(wanted: Where, systems: &Systems, programs: &Path, run: &Run) -> Result<Place> {
    if wanted == Where::Lab {
        eprintln!("lab: guests run in the lab VM");
        return Ok(Place::Lab);
    }
    let site = systems.host_site(programs, run.path());
    match probe::host_obstacle(systems, &site, wanted == Where::Host)? {
        None => {
            eprintln!("lab: guests run on this machine's own KVM");
            Ok(Place::Host)
        }
        Some(obstacle) if wanted == Where::Host => Err(LabError::Setup(format!(
            "guests cannot run on this machine: {obstacle}; use --where lab"
        ))),
        Some(obstacle) => {
            eprintln!("lab: guests run in the lab VM, not on this machine: {obstacle}");
            Ok(Place::Lab)
        }
    }
}
