"""The commands of `sightline`, by group; each module has an `app`. Heavy imports happen inside the commands."""
