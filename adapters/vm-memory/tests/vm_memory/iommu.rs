//! `IommuMemory`: writes by IOVA, in areas that are sparse in 2^64 bytes.

use super::{PAGE, bytes, machine, taken};
use dirtymap::space::FaultSource;
use dirtymap::{Access, AddressSpace, Granule, IovaRange};
use dirtymap_vm_memory::SpaceBitmap;
use std::sync::{Arc, RwLock, RwLockReadGuard};
use vm_memory::bitmap::{AtomicBitmap, Bitmap, NewBitmap};
use vm_memory::iommu::{Error, IotlbIterator};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, Iommu, IommuMemory, Iotlb,
    Permissions,
};

const HIGH: u64 = 0x7fff_0000_0000;

/// All mappings are in the IOTLB.
#[derive(Debug, Default)]
struct Table(RwLock<Iotlb>);

impl Iommu for Table {
    type IotlbGuard<'a> = RwLockReadGuard<'a, Iotlb>;

    fn translate(
        &self,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<Self::IotlbGuard<'_>>, Error> {
        Iotlb::lookup(self.0.read().unwrap(), iova, length, access).map_err(|fails| {
            Error::IommuMisconfigured {
                reason: format!("{fails:?}"),
            }
        })
    }
}

impl Table {
    fn map(&self, iova: u64, gpa: u64, len: usize) {
        let (iova, gpa) = (GuestAddress(iova), GuestAddress(gpa));
        let mut iotlb = self.0.write().unwrap();
        iotlb
            .set_mapping(iova, gpa, len, Permissions::ReadWrite)
            .unwrap();
    }
}

/// Guest memory of 16 pages behind an IOMMU that maps `HIGH` to its page 4. The space is that of
/// the IOVAs.
fn behind_iommu() -> (
    Arc<AddressSpace>,
    IommuMemory<GuestMemoryMmap<SpaceBitmap>, Table>,
) {
    let (_, memory) = machine(&[(0, 16 * PAGE)]);
    let iovas = Arc::new(AddressSpace::new(Granule::K4));
    iovas.start_tracking().unwrap();
    let table = Table::default();
    table.map(HIGH, 4 * PAGE, 4096 * 4);
    let bitmap = SpaceBitmap::new(&iovas, IovaRange::ALL);
    (iovas, IommuMemory::new(memory, table, true, bitmap))
}

/// The bug: `AtomicBitmap` is as long as the guest's memory, and ignores a write at a high IOVA in
/// silence. This test shows the bug there, the next one the behaviour here.
#[test]
fn with_the_bitmap_of_vm_memory_a_write_at_a_high_iova_is_marked_nowhere() {
    let ranges = [(GuestAddress(0), 16 * 4096)];
    let memory = GuestMemoryMmap::<AtomicBitmap>::from_ranges(&ranges).unwrap();
    let table = Table::default();
    table.map(HIGH, 4 * PAGE, 4096 * 4);
    let bitmap = AtomicBitmap::with_len(16 * 4096);
    let memory = IommuMemory::new(memory, table, true, bitmap);
    memory.write_obj(7u64, GuestAddress(HIGH + PAGE)).unwrap();
    let landed: u64 = memory
        .get_backend()
        .read_obj(GuestAddress(5 * PAGE))
        .unwrap();
    assert_eq!(landed, 7);
    assert!(
        memory
            .bitmap()
            .get_and_reset()
            .iter()
            .all(|word| *word == 0)
    );
    let backend = memory.get_backend();
    let mut regions = backend.iter().map(|region| (**region).bitmap());
    assert!(regions.all(|bitmap| bitmap.get_and_reset().iter().all(|word| *word == 0)));
}

#[test]
fn a_write_at_a_high_iova_lands_in_its_area() {
    let (iovas, memory) = behind_iommu();
    let area = bytes(HIGH, 4 * PAGE);
    iovas.map(area, 4 * PAGE, Access::ReadWrite).unwrap();
    memory.write_obj(7u64, GuestAddress(HIGH + PAGE)).unwrap();
    assert!(memory.bitmap().dirty_at((HIGH + PAGE) as usize));
    assert_eq!(taken(&iovas, area), [HIGH / PAGE + 1]);
    assert_eq!(iovas.stats().outside_marks, 0);
    // The mapping tells which guest page that is.
    let mapping = iovas.lookup(area.start()).unwrap();
    assert_eq!(mapping.backing + PAGE, 5 * PAGE);
}

#[test]
fn a_write_at_an_iova_without_area_is_counted_and_named() {
    let (iovas, memory) = behind_iommu();
    memory.write_obj(7u64, GuestAddress(HIGH + PAGE)).unwrap();
    assert_eq!(iovas.stats().outside_marks, 1);
    let fault = iovas.faults().recent[0];
    assert_eq!((fault.at.get(), fault.len), (HIGH + PAGE, 8));
    assert_eq!(fault.source, FaultSource::Mark);
    // An area that is mapped later gets the writes from then on.
    let area = bytes(HIGH, 4 * PAGE);
    iovas.map(area, 4 * PAGE, Access::ReadWrite).unwrap();
    memory.write_obj(7u64, GuestAddress(HIGH)).unwrap();
    assert_eq!(taken(&iovas, area), [HIGH / PAGE]);
    assert_eq!(iovas.stats().outside_marks, 1);
}

#[test]
fn a_write_across_two_mappings_marks_both_areas() {
    let (iovas, memory) = behind_iommu();
    memory.iommu().map(HIGH + 4 * PAGE, 0, 4096);
    let areas = [bytes(HIGH, 4 * PAGE), bytes(HIGH + 4 * PAGE, PAGE)];
    iovas.map(areas[0], 4 * PAGE, Access::ReadWrite).unwrap();
    iovas.map(areas[1], 0, Access::ReadWrite).unwrap();
    memory
        .write_slice(&[1; 64], GuestAddress(HIGH + 4 * PAGE - 32))
        .unwrap();
    let first = HIGH / PAGE;
    assert_eq!(taken(&iovas, bytes(HIGH, 5 * PAGE)), [first + 3, first + 4]);
}

#[test]
fn with_the_iommu_off_the_regions_are_marked() {
    let (iovas, mut memory) = behind_iommu();
    memory.set_iommu_enabled(false);
    memory.write_obj(7u64, GuestAddress(2 * PAGE)).unwrap();
    let backend = memory.get_backend();
    let space = (**backend.iter().next().unwrap()).bitmap().space().clone();
    assert_eq!(taken(&space, bytes(0, 16 * PAGE)), [2]);
    assert_eq!(iovas.stats().outside_marks, 0);
}
