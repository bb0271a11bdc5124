//! A whole pool as processes: its faults, an outage, its size, and what it takes
//! while nothing happens.

mod budget;
mod faults;
mod outage;
mod scale;
