//! Deserialized values obey the same rules as constructed ones.
#![cfg(all(feature = "serde", not(dirtymap_loom)))]
#![allow(clippy::unwrap_used)] // helpers of tests

use dirtymap::exchange::RunTable;
use dirtymap::{Granule, Iova, IovaRange};
use serde_json::{from_str, from_value, json, to_value};

fn range(start: u64, len: u64) -> IovaRange {
    IovaRange::from_len(Iova::new(start), len).unwrap()
}

#[test]
fn addresses_ranges_granules_and_tables_come_back() {
    let table: RunTable = [range(0, 4096), range(8192, 4096)].into_iter().collect();
    let text = serde_json::to_string(&table).unwrap();
    assert_eq!(
        text,
        r#"[{"start":0,"last":4095},{"start":8192,"last":12287}]"#
    );
    assert_eq!(from_str::<RunTable>(&text).unwrap(), table);
    for value in [range(0, 1), IovaRange::ALL] {
        assert_eq!(
            from_value::<IovaRange>(to_value(value).unwrap()).unwrap(),
            value
        );
    }
    assert_eq!(from_str::<Iova>("4096").unwrap(), Iova::new(4096));
    for lg2 in 0..64 {
        let granule = Granule::from_lg2(lg2).unwrap();
        assert_eq!(
            from_value::<Granule>(to_value(granule).unwrap()).unwrap(),
            granule
        );
    }
}

#[test]
fn what_could_not_be_made_is_not_deserialized() {
    let refused = |error: serde_json::Error, text: &str| {
        let said = error.to_string();
        assert!(said.contains(text), "{said}");
    };
    refused(
        from_value::<Granule>(json!(4097)).unwrap_err(),
        "4097 bytes",
    );
    refused(from_value::<Granule>(json!(0)).unwrap_err(), "power of two");
    let reversed = json!({"start": 8, "last": 7});
    refused(
        from_value::<IovaRange>(reversed).unwrap_err(),
        "below its start",
    );
    let extra = json!({"start": 8, "last": 9, "len": 2});
    refused(from_value::<IovaRange>(extra).unwrap_err(), "unknown field");
    for second in [
        json!({"start": 4, "last": 9}),
        json!({"start": 0, "last": 0}),
    ] {
        let runs = json!([{"start": 1, "last": 3}, second]);
        refused(
            from_value::<RunTable>(runs).unwrap_err(),
            "must begin above the end",
        );
    }
    assert!(from_value::<RunTable>(json!([])).unwrap().is_empty());
}
