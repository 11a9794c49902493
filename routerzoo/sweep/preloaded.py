"""What the server of runs imports before it forks. Nothing else may import this: it takes as long as a run's start."""

from routerzoo.sweep import work

work.preload()
