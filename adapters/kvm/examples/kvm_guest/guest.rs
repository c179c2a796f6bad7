//! The machine and its rounds.

use std::collections::BTreeSet;
use std::error::Error;
use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Parser, ValueEnum};
use dirtymap::{Access, AddressSpace, HarvestRequest, Iova, IovaRange, UserBitmap};
use dirtymap_kvm::{KvmError, KvmLog, KvmMode};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use memmap2::MmapMut;

/// Increments a byte in each of CX pages, from segment BX on, DX paragraphs apart; then stops.
const CODE: [u8; 12] = [
    0x8e, 0xc3, // mov es, bx
    0x26, 0xfe, 0x06, 0x00, 0x00, // inc byte [es:0]
    0x01, 0xd3, // add bx, dx
    0xe2, 0xf5, // loop
    0xf4, // hlt
];
/// The page that holds it.
const CODE_PAGE: u64 = 1;
/// The memory that a guest in real mode reaches.
const RAM: u64 = 1 << 20;
/// KVM_EXIT_DIRTY_RING_FULL.
const RING_FULL: u32 = 31;
/// Pages of the guest; KVM lets a ring of this size be filled.
const RING: u32 = 1024;

/// A guest of a few bytes under KVM, and a VMM that writes its memory too: both come out of one
/// harvest.
///
/// Exit status: 0 if everything was found and the copy is the memory, or if it is skipped for want
/// of KVM; 1 if not; 2 if the input is refused.
#[derive(Parser, Debug)]
#[command(name = "kvm_guest", max_term_width = 100)]
struct Cli {
    /// How the log of KVM is read; all: every mode, in one machine after the other
    #[arg(long, value_enum, value_name = "MODE", default_value = "all")]
    mode: Mode,

    /// Rounds of writes and harvest for each machine, 1 to 1000
    #[arg(
        long, value_name = "N", default_value_t = 4,
        value_parser = clap::value_parser!(u64).range(1..=1000),
    )]
    rounds: u64,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Every mode that this KVM has
    All,
    /// Reading the log clears it
    Clearing,
    /// Read, then clear exactly what was recorded
    Manual,
    /// As manual, and everything is dirty at the start
    InitiallySet,
    /// A ring for each processor
    Ring,
}

impl Mode {
    fn modes(self) -> Vec<KvmMode> {
        let manual = |initially_set| KvmMode::Manual { initially_set };
        let ring = KvmMode::Ring { entries: RING };
        match self {
            Mode::All => vec![KvmMode::Clearing, manual(false), manual(true), ring],
            Mode::Clearing => vec![KvmMode::Clearing],
            Mode::Manual => vec![manual(false)],
            Mode::InitiallySet => vec![manual(true)],
            Mode::Ring => vec![ring],
        }
    }
}

pub(crate) fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            let _ = writeln!(io::stderr(), "error: {error}");
            ExitCode::from(2)
        }
    }
}

fn run(cli: &Cli) -> Result<bool, Box<dyn Error>> {
    let mut out = io::stdout().lock();
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => {
            writeln!(out, "SKIP kvm_guest: /dev/kvm cannot be used: {error}")?;
            return Ok(true);
        }
    };
    let mut verified = true;
    for mode in cli.mode.modes() {
        writeln!(out, "{mode:?}")?;
        match Machine::new(&kvm, mode) {
            Ok(mut machine) => verified &= machine.run(cli.rounds, &mut out)?,
            Err(Failure::Kvm(error @ KvmError::Unsupported { .. })) => {
                writeln!(out, "  SKIP: {error}")?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    let verdict = if verified { "verified" } else { "NOT verified" };
    writeln!(out, "{verdict}: guest and VMM out of one harvest")?;
    Ok(verified)
}

#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}")]
    Kvm(#[from] KvmError),
    #[error("KVM: {0}")]
    Call(#[from] kvm_ioctls::Error),
    #[error("{0}")]
    Tracking(#[from] dirtymap::Error),
    #[error("{0}")]
    Range(#[from] dirtymap::RangeError),
    #[error("{0}")]
    Memory(#[from] io::Error),
    #[error("the guest stopped with {0}")]
    Exit(String),
}

/// Fields are dropped in this order: the memory last.
struct Machine {
    space: AddressSpace,
    log: Arc<KvmLog>,
    vcpu: VcpuFd,
    ram: MmapMut,
    copy: Vec<u8>,
    page: u64,
}

impl Machine {
    fn new(kvm: &Kvm, mode: KvmMode) -> Result<Self, Failure> {
        let vm = kvm.create_vm()?;
        // A ring has to be set up before the first processor.
        let log = Arc::new(KvmLog::new(&vm, mode)?);
        let vcpu = vm.create_vcpu(0)?;
        if matches!(mode, KvmMode::Ring { .. }) {
            log.add_vcpu(&vcpu)?;
        }
        let mut ram = MmapMut::map_anon(RAM as usize)?;
        let page = log.page().bytes();
        let code = (CODE_PAGE * page) as usize;
        ram[code..code + CODE.len()].copy_from_slice(&CODE);

        let all = IovaRange::from_len(Iova::new(0), RAM)?;
        // SAFETY: the memory is mapped as long as the machine is there; it is read and written only
        // while the guest does not run.
        unsafe { log.add_slot(0, all, ram.as_ptr().addr() as u64) }?;
        let space = AddressSpace::with_source(log.page(), Arc::clone(&log))?;
        space.map(all, 0, Access::ReadWrite)?;
        space.start_tracking()?;
        // From here on every write is reported, so one copy of everything is enough.
        let copy = ram.to_vec();

        let mut sregs = vcpu.get_sregs()?;
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        vcpu.set_sregs(&sregs)?;
        Ok(Machine {
            space,
            log,
            vcpu,
            ram,
            copy,
            page,
        })
    }

    /// Whether each round finds what was written, and the copy is the memory.
    fn run(&mut self, rounds: u64, out: &mut impl Write) -> Result<bool, Failure> {
        let mut verified = true;
        for round in 1..=rounds {
            // Every third, fourth ... page from a place that moves.
            let (step, first) = (2 + round % 5, 8 + round % 7);
            let written = (RAM / self.page - first) / step;
            self.guest_writes(first, written, step)?;
            let guest: BTreeSet<u64> = (0..written).map(|n| first + n * step).collect();
            let vmm: BTreeSet<u64> = (0..3).map(|n| 3 + (round * 41 + n * 57) % 250).collect();
            for page in &vmm {
                self.vmm_writes(*page, round)?;
            }
            let found = self.harvest()?;
            let expected: BTreeSet<u64> = guest.union(&vmm).copied().collect();
            let missing = expected.difference(&found).count();
            let more = found.difference(&expected).count();
            // With `initially_set`, everything is dirty once.
            let initially_set = KvmMode::Manual {
                initially_set: true,
            };
            let tight = more == 0 || (round == 1 && self.log.mode() == initially_set);
            verified &= missing == 0 && tight;
            writeln!(
                out,
                "  round {round}: guest wrote {} pages, VMM {}; harvest found {}, \
                 {missing} missing, {more} more",
                guest.len(),
                vmm.len(),
                found.len(),
            )?;
        }
        let same = self.ram[..] == self.copy[..];
        let verdict = if same { "is" } else { "is NOT" };
        writeln!(out, "  the copy {verdict} the memory of the guest")?;
        Ok(verified && same)
    }

    fn guest_writes(&mut self, first: u64, pages: u64, step: u64) -> Result<(), Failure> {
        let mut regs = self.vcpu.get_regs()?;
        regs.rip = CODE_PAGE * self.page;
        regs.rflags = 2;
        regs.rbx = first * self.page / 16;
        regs.rcx = pages;
        regs.rdx = step * self.page / 16;
        self.vcpu.set_regs(&regs)?;
        loop {
            match self.vcpu.run()? {
                VcpuExit::Hlt => return Ok(()),
                VcpuExit::Unsupported(RING_FULL) => {
                    self.log.drain_rings()?;
                }
                exit => return Err(Failure::Exit(format!("{exit:?}"))),
            }
        }
    }

    /// As an emulated device does: first the data, then the mark.
    fn vmm_writes(&mut self, page: u64, round: u64) -> Result<(), Failure> {
        let at = page * self.page + 100;
        self.ram[at as usize..][..8].copy_from_slice(&round.to_le_bytes());
        self.space.mark(IovaRange::from_len(Iova::new(at), 8)?)?;
        Ok(())
    }

    /// The pages that were written, copied.
    fn harvest(&mut self) -> Result<BTreeSet<u64>, Failure> {
        let mut words = vec![0u64; (RAM / self.page).div_ceil(64) as usize];
        let all = IovaRange::from_len(Iova::new(0), RAM)?;
        let request = HarvestRequest::new(all, self.log.page());
        let lease = self.space.harvest(&request, UserBitmap::new(&mut words));
        let lease = lease?.sync();
        let lease = lease?;
        let mut found = BTreeSet::new();
        for run in lease.runs() {
            let (start, end) = (run.start().get() as usize, run.last().get() as usize + 1);
            self.copy[start..end].copy_from_slice(&self.ram[start..end]);
            found.extend(start as u64 / self.page..end as u64 / self.page);
        }
        lease.commit();
        Ok(found)
    }
}
