//! A whole pool as processes: its faults, an outage, who may connect, its size, and what it takes
//! while nothing happens.

mod admission;
mod budget;
mod companion;
mod drain;
mod faults;
mod late;
mod near;
mod outage;
mod readiness;
mod scale;
mod unavailable;
