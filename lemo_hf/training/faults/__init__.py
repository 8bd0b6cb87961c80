"""What a run does about kills, signals, full disks, memory that runs out, and samples that would spoil it."""
