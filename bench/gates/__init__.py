"""What CI and the README hold: exact counts of a step, one ratio of processor time, the demo's figures."""
