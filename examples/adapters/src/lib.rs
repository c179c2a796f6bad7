#![doc = include_str!("../joint.md")]
