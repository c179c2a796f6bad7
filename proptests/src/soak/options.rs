//! The command line.

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, ValueEnum};
use dirtymap::sync::Step;
use pagetable_sim::Breakage;

/// Runs devices, CPU threads, mappers, domains that are attached and detached, and harvesters at
/// full speed, over real bytes. Every few seconds all writers rest, and the copy is compared with
/// the writes, byte for byte.
///
/// Exit status: 0 if nothing was lost, 1 at the first difference, 2 if an option is refused.
#[derive(Parser, Clone, Debug)]
#[command(name = "soak", max_term_width = 100)]
pub struct Options {
    /// Length of the run in minutes, which may be a fraction [default: 1]
    #[arg(long, value_name = "N", value_parser = amount, conflicts_with = "seconds")]
    pub minutes: Option<f64>,

    /// Length of the run in seconds
    #[arg(long, value_name = "N", value_parser = amount)]
    pub seconds: Option<f64>,

    /// Seed of all random choices; the interleaving of threads still differs
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,

    /// Devices that write all the time, 0 to 16
    #[arg(
        long, value_name = "N", default_value_t = 4,
        value_parser = clap::value_parser!(u32).range(0..=16)
    )]
    pub devices: u32,

    /// CPU threads that write and mark, 0 to 16
    #[arg(
        long, value_name = "N", default_value_t = 2,
        value_parser = clap::value_parser!(u32).range(0..=16)
    )]
    pub cpus: u32,

    /// Threads that map, cut and unmap, 0 to 16
    #[arg(
        long, value_name = "N", default_value_t = 4,
        value_parser = clap::value_parser!(u32).range(0..=16)
    )]
    pub mappers: u32,

    /// Threads that attach a domain, let its device write, and detach it, 0 to 16
    #[arg(
        long, value_name = "N", default_value_t = 2,
        value_parser = clap::value_parser!(u32).range(0..=16)
    )]
    pub attachers: u32,

    /// Threads that harvest, copy, and commit or abort, 0 to 16
    #[arg(
        long, value_name = "N", default_value_t = 2,
        value_parser = clap::value_parser!(u32).range(0..=16)
    )]
    pub harvesters: u32,

    /// Threads that each harvest for a named consumer, which leaves and comes back now and then, 0
    /// to 16
    #[arg(
        long,
        value_name = "N",
        default_value_t = 0,
        value_parser = clap::value_parser!(u32).range(0..=16)
    )]
    pub consumers: u32,

    /// Threads that write and discard pages of their own, 0 to 16
    #[arg(
        long,
        value_name = "N",
        default_value_t = 0,
        value_parser = clap::value_parser!(u32).range(0..=16)
    )]
    pub discarders: u32,

    /// Of 16 turns of a device, so many at which it stays at one page for a while, 0 to 16
    #[arg(
        long, value_name = "N", default_value_t = 1,
        value_parser = clap::value_parser!(u64).range(0..=16)
    )]
    pub stay: u64,

    /// Seconds between two comparisons
    #[arg(long, value_name = "N", default_value_t = 2.0, value_parser = amount)]
    pub checkpoint: f64,

    /// The most that resident memory may grow from the first comparison to the last, in MiB;
    /// ignored with --forget
    #[arg(long, value_name = "MIB", default_value_t = 64)]
    pub growth: u64,

    /// Let sources panic now and then, in any callback; the callers catch the panic and go on
    #[arg(long)]
    pub panics: bool,

    /// Give one of the permanent domains pages of 16 KiB, the others 4 KiB
    #[arg(long)]
    pub large_pages: bool,

    /// Let consumers forget leases that they have copied, now and then
    #[arg(long)]
    pub forget: bool,

    /// Give consumers small bounds now and then, beyond which they are told everything
    #[arg(long)]
    pub bounds: bool,

    /// Break one step, to see that the comparison finds the loss
    #[arg(long, value_enum, value_name = "KIND")]
    pub sabotage: Option<Sabotage>,
}

/// A step that is broken on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Sabotage {
    /// Invalidations reach no device.
    SkipFlush,
    /// Devices acknowledge invalidations before their posted writes have landed.
    NoDrain,
    /// Each invalidated range lacks its last page.
    ShortFlush,
    /// Devices keep pointers to tables that were replaced.
    SkipNonLeaf,
    /// Leases that should be aborted are committed without a copy.
    ForgetAbort,
    /// Pages are copied before the lease is synced.
    CopyBeforeSync,
    /// Leases are forgotten before their flush and copy.
    ForgetLease,
    /// Harvests do not leave what they take to one of the other consumers; needs --consumers.
    ForgetConsumer,
    /// Harvests leave it without the debt, which only their lease knows; needs --consumers.
    ForgetDebt,
    /// Discards drop the debt of their range; needs --discarders.
    DiscardWithoutFlush,
    /// Discards do not leave their range to the consumers; needs --discarders.
    ForgetDiscard,
    /// Harvests leave a page marked as zero that was written; needs --discarders.
    ZeroOverData,
    /// The delta of a cursor that is dropped is not merged into another one; needs --consumers.
    ForgetMerge,
    /// Consumers out of bounds are not told everything; needs --consumers and --bounds.
    ForgetWhole,
}

impl Options {
    /// How long the run takes.
    pub(super) fn duration(&self) -> std::time::Duration {
        let minutes = self.minutes.unwrap_or(1.0);
        std::time::Duration::from_secs_f64(self.seconds.unwrap_or(minutes * 60.0))
    }

    /// The unit of areas, cuts and requests, in pages.
    pub(super) fn unit(&self) -> u64 {
        if self.large_pages { 4 } else { 1 }
    }

    /// The fault of the hardware.
    pub(super) fn breakage(&self) -> Breakage {
        match self.sabotage {
            Some(Sabotage::SkipFlush) => Breakage::IgnoreInvalidations,
            Some(Sabotage::NoDrain) => Breakage::AcknowledgeWithoutDraining,
            Some(Sabotage::ShortFlush) => Breakage::FlushShortByOnePage,
            Some(Sabotage::SkipNonLeaf) => Breakage::SkipNonLeaf,
            Some(
                Sabotage::ForgetAbort
                | Sabotage::CopyBeforeSync
                | Sabotage::ForgetLease
                | Sabotage::ForgetConsumer
                | Sabotage::ForgetDebt
                | Sabotage::DiscardWithoutFlush
                | Sabotage::ForgetDiscard
                | Sabotage::ZeroOverData
                | Sabotage::ForgetMerge
                | Sabotage::ForgetWhole,
            )
            | None => Breakage::None,
        }
    }

    /// The step of the library that harvests and discards leave out.
    pub(super) fn left_out(&self) -> Option<Step> {
        match self.sabotage {
            Some(Sabotage::ForgetConsumer) => Some(Step::LeaveToOthers),
            Some(Sabotage::ForgetDebt) => Some(Step::CarryDebt),
            Some(Sabotage::DiscardWithoutFlush) => Some(Step::FlushAtDiscard),
            Some(Sabotage::ForgetDiscard) => Some(Step::TellDiscard),
            Some(Sabotage::ZeroOverData) => Some(Step::TakenIsData),
            Some(Sabotage::ForgetMerge) => Some(Step::MergeDelta),
            Some(Sabotage::ForgetWhole) => Some(Step::TellWhole),
            _ => None,
        }
    }

    /// Checks that concern several options.
    ///
    /// # Errors
    /// A sabotage of consumers without consumers, of discards without discarders, of bounds without
    /// bounds.
    pub fn checked(self) -> Result<Self, clap::Error> {
        let lacks = match self.sabotage {
            Some(Sabotage::ForgetWhole) if !self.bounds => "--bounds: no consumer has small bounds",
            Some(
                Sabotage::ForgetConsumer
                | Sabotage::ForgetDebt
                | Sabotage::ForgetMerge
                | Sabotage::ForgetWhole,
            ) if self.consumers == 0 => {
                "--consumers 1 or more: a harvest without other consumers leaves nothing to anybody"
            }
            Some(
                Sabotage::DiscardWithoutFlush | Sabotage::ForgetDiscard | Sabotage::ZeroOverData,
            ) if self.discarders == 0 => "--discarders 1 or more: nothing is discarded",
            _ => return Ok(self),
        };
        Err(<Options as CommandFactory>::command().error(
            ErrorKind::ArgumentConflict,
            format!("this sabotage needs {lacks}"),
        ))
    }

    /// The command that repeats this run.
    pub(super) fn command(&self) -> String {
        let mut command = format!(
            "cargo run --release -p proptests --bin soak -- --seconds {} --seed {} --devices {} \
             --cpus {} --mappers {} --attachers {} --harvesters {} --consumers {} \
             --discarders {} --stay {} --checkpoint {}",
            self.duration().as_secs_f64(),
            self.seed,
            self.devices,
            self.cpus,
            self.mappers,
            self.attachers,
            self.harvesters,
            self.consumers,
            self.discarders,
            self.stay,
            self.checkpoint,
        );
        let flags = [
            (self.panics, " --panics"),
            (self.large_pages, " --large-pages"),
            (self.forget, " --forget"),
            (self.bounds, " --bounds"),
        ];
        for (_, flag) in flags.iter().filter(|(on, _)| *on) {
            command += flag;
        }
        if let Some(sabotage) = self.sabotage.and_then(|kind| kind.to_possible_value()) {
            command += " --sabotage ";
            command += sabotage.get_name();
        }
        command
    }
}

/// A number of minutes or seconds: above 0, at most a year of minutes.
fn amount(text: &str) -> Result<f64, String> {
    const MOST: f64 = 525_600.0;
    match text.parse::<f64>() {
        Ok(amount) if amount > 0.0 && amount <= MOST => Ok(amount),
        Ok(_) => Err(format!("must be above 0 and at most {MOST}")),
        Err(error) => Err(error.to_string()),
    }
}
