"""What every room needs of the machine: devices, memory, signals, locks, disk errors, files written by strangers."""
