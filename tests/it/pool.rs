//! A whole pool as processes: its faults, an outage, and its size.

mod faults;
mod outage;
mod scale;
