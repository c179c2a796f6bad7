//! All hardware of one program: one memory, and domains of different formats over it.

use dirtymap::sync::Arc;
use dirtymap::{Iova, IovaRange};
use pagetable_sim::{AmdV1, ArmS1, DmaError, PhysMemory, RiscvSv48, VtdSs, X86_64};

use crate::faults::Faulty;
use crate::log_node::LogNode;
use crate::op::{Config, DOMAINS, Format, Master};
use crate::pages::MEMORY;
use crate::rig::Rig;

/// See the [module](self).
pub(crate) struct World {
    pub(crate) memory: Arc<PhysMemory>,
    pub(crate) nodes: [Arc<Faulty>; DOMAINS],
}

impl World {
    pub(crate) fn new(config: &Config) -> Result<World, pagetable_sim::Error> {
        let memory = Arc::new(PhysMemory::new(MEMORY)?);
        let node = |nth: usize| {
            Arc::new(match config.formats[nth] {
                Format::Amd => {
                    Faulty::new(Rig::<AmdV1>::new(config, nth, &memory), config.sabotage)
                }
                Format::Vtd => {
                    Faulty::new(Rig::<VtdSs>::new(config, nth, &memory), config.sabotage)
                }
                Format::Arm => {
                    Faulty::new(Rig::<ArmS1>::new(config, nth, &memory), config.sabotage)
                }
                Format::Arm16K => {
                    Faulty::new(Rig::<ArmS1<14>>::new(config, nth, &memory), config.sabotage)
                }
                Format::Arm64K => {
                    Faulty::new(Rig::<ArmS1<16>>::new(config, nth, &memory), config.sabotage)
                }
                Format::X86 => {
                    Faulty::new(Rig::<X86_64>::new(config, nth, &memory), config.sabotage)
                }
                Format::Riscv => {
                    Faulty::new(Rig::<RiscvSv48>::new(config, nth, &memory), config.sabotage)
                }
                Format::Log4K => {
                    Faulty::new(LogNode::new(config, nth, 12, &memory), config.sabotage)
                }
                Format::Log8K => {
                    Faulty::new(LogNode::new(config, nth, 13, &memory), config.sabotage)
                }
                Format::Log64K => {
                    Faulty::new(LogNode::new(config, nth, 16, &memory), config.sabotage)
                }
            })
        };
        let nodes = [node(0), node(1), node(2)];
        Ok(World { memory, nodes })
    }

    pub(crate) fn node(&self, domain: impl Into<usize>) -> &Arc<Faulty> {
        &self.nodes[domain.into()]
    }

    pub(crate) fn write(&self, device: Master, at: Iova, bytes: &[u8]) -> Result<(), DmaError> {
        self.settle(Some(device), at, bytes.len());
        self.node(device.domain).write(device.device, at, bytes)
    }

    pub(crate) fn read(&self, device: Master, at: Iova, bytes: &mut [u8]) -> Result<(), DmaError> {
        self.settle(Some(device), at, bytes.len());
        self.node(device.domain).read(device.device, at, bytes)
    }

    /// Lands the writes of all devices but `except` that may be in flight to these bytes, so that
    /// the last of several writers wins, as in the oracle.
    pub(crate) fn settle(&self, except: Option<Master>, at: Iova, len: usize) {
        let Ok(range) = IovaRange::from_len(at, len as u64) else {
            return;
        };
        for (nth, node) in self.nodes.iter().enumerate() {
            let same = except.filter(|device| usize::from(device.domain) == nth);
            node.settle(same.map(|device| device.device), range);
        }
    }

    /// Lands all writes in flight, and puts all devices to sleep.
    pub(crate) fn quiesce(&self) {
        for node in &self.nodes {
            node.quiesce(0);
            node.quiesce(1);
        }
    }

    /// The number of domains that will fail their next flush.
    pub(crate) fn failures_ahead(&self) -> u64 {
        self.nodes
            .iter()
            .filter(|node| node.fails().is_on())
            .count() as u64
    }

    /// Withdraws all requested failures, panics and stops.
    pub(crate) fn heal(&self) {
        for node in &self.nodes {
            node.heal();
        }
    }
}
