"""What every room needs of the machine: devices, signals, disk errors, files written by strangers."""
