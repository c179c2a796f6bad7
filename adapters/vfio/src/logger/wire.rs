//! The messages of vfio-user that start, read and stop the log.

use crate::logger::{DmaLogger, LogError};
use crate::range::DmaRange;

/// Sizes of the structs of a message, in bytes.
const HEADER: usize = 8;
const CONTROL: usize = 16;
const RANGE: usize = 16;
const REPORT: usize = 24;

/// Features of `VFIO_USER_DEVICE_FEATURE`, in the lower half of its flags.
const START: u32 = 6;
const STOP: u32 = 7;
const ASK: u32 = 8;
/// The directions, in the upper half of the flags.
const GET: u32 = 1 << 16;
const SET: u32 = 1 << 17;
const PROBE: u32 = 1 << 18;

impl DmaLogger {
    /// Handles the payload of a message `VFIO_USER_DEVICE_FEATURE` (command 16) of the client:
    /// start, report and stop of the log, and the probe for each of them. Returns the payload of
    /// the reply, or `None` for another feature, which the server handles itself.
    ///
    /// `most` is the most bytes that the server sends in one message (`max_data_xfer_size`). A
    /// report that needs more is refused.
    ///
    /// ```
    /// # use dirtymap::{Access, AddressSpace, Granule};
    /// # use dirtymap_vfio::{DmaLogger, DmaRange};
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let space = std::sync::Arc::new(AddressSpace::tracked(Granule::K4));
    /// # space.map(0..1 << 20, 0, Access::ReadWrite)?;
    /// # let log = DmaLogger::new(space.clone(), "nvme0");
    /// log.start(4096, &[DmaRange { iova: 0, length: 1 << 20 }])?;
    /// space.mark(0x3000..0x3001)?;
    /// let mut request = Vec::new();
    /// for word in [40, 1 << 16 | 8] {
    ///     request.extend(u32::to_le_bytes(word)); // bytes of the reply; GET of a report
    /// }
    /// for word in [0, 64 << 12, 4096] {
    ///     request.extend(u64::to_le_bytes(word)); // first address, length, page
    /// }
    /// let reply = log.device_feature(&request, 1 << 20)?.ok_or("another feature")?;
    /// assert_eq!(reply[32..], [0b1000, 0, 0, 0, 0, 0, 0, 0]);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// In this order: [`LogError::BadMessage`], [`LogError::TooLarge`], then those of the call that
    /// the message stands for. [`LogError::errno`] goes into the reply.
    #[doc(alias = "VFIO_USER_DEVICE_FEATURE")]
    pub fn device_feature(&self, request: &[u8], most: usize) -> Result<Option<Vec<u8>>, LogError> {
        let (argsz, flags) = (u32_at(request, 0)?, u32_at(request, 4)?);
        let feature = flags & 0xffff;
        let direction = flags & (GET | SET);
        let right = match feature {
            START | STOP => SET,
            ASK => GET,
            _ => return Ok(None),
        };
        if flags & PROBE != 0 {
            let is_right = direction == 0 || direction == right;
            return match is_right {
                true => Ok(Some(request[..HEADER].to_vec())),
                false => Err(bad("it probes the feature for the other direction")),
            };
        }
        if direction != right {
            return Err(bad("START and STOP need the flag SET, REPORT needs GET"));
        }
        match feature {
            START => self.wire_start(request).map(Some),
            ASK => self.wire_report(request, argsz, most).map(Some),
            _ => {
                self.stop()?;
                Ok(Some(request[..HEADER].to_vec()))
            }
        }
    }

    /// The reply is the request, with the page of the log.
    fn wire_start(&self, request: &[u8]) -> Result<Vec<u8>, LogError> {
        let page_size = u64_at(request, HEADER)?;
        let count = u32_at(request, HEADER + 8)? as usize;
        let ranges = request.get(HEADER + CONTROL..).unwrap_or_default();
        // Only ranges that the message contains are collected, whatever count it announces.
        let ranges: Vec<DmaRange> = ranges
            .chunks_exact(RANGE)
            .take(count)
            .map(|range| range_at(range, 0))
            .collect::<Result<_, _>>()?;
        if ranges.len() != count {
            return Err(bad("it has fewer ranges than it announces"));
        }
        let page = self.start(page_size, &ranges)?;
        let mut reply = request.to_vec();
        let place = reply.get_mut(HEADER..HEADER + 8);
        place
            .into_iter()
            .for_each(|place| place.copy_from_slice(&page.bytes().to_le_bytes()));
        Ok(reply)
    }

    /// The reply is the request, and the bitmap in whole words of 64 bits.
    fn wire_report(&self, request: &[u8], argsz: u32, most: usize) -> Result<Vec<u8>, LogError> {
        let range = range_at(request, HEADER)?;
        let page_size = u64_at(request, HEADER + 16)?;
        let pages = range.length.checked_div(page_size).unwrap_or(0);
        let needed = u128::from(pages.div_ceil(64)) * 8 + (HEADER + REPORT) as u128;
        if needed > most as u128 {
            return Err(LogError::TooLarge { needed, most });
        }
        if needed > u128::from(argsz) {
            return Err(bad("its argsz has no room for the bitmap"));
        }
        let mut reply = request.get(..HEADER + REPORT).unwrap_or_default().to_vec();
        reply.resize(needed as usize, 0); // fits: at most `most`
        let bitmap = reply.get_mut(HEADER + REPORT..).unwrap_or_default();
        self.report(range, page_size, bitmap)?;
        Ok(reply)
    }
}

fn bad(why: &'static str) -> LogError {
    LogError::BadMessage { why }
}

fn bytes_at<const N: usize>(message: &[u8], at: usize) -> Result<[u8; N], LogError> {
    let bytes = message.get(at..).and_then(|rest| rest.first_chunk());
    bytes.copied().ok_or(bad("it ends early"))
}

fn u32_at(message: &[u8], at: usize) -> Result<u32, LogError> {
    Ok(u32::from_le_bytes(bytes_at(message, at)?))
}

fn u64_at(message: &[u8], at: usize) -> Result<u64, LogError> {
    Ok(u64::from_le_bytes(bytes_at(message, at)?))
}

fn range_at(message: &[u8], at: usize) -> Result<DmaRange, LogError> {
    Ok(DmaRange {
        iova: u64_at(message, at)?,
        length: u64_at(message, at + 8)?,
    })
}
