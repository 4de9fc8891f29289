"""Starting runs: the processes of one machine (`local`), jobs of a SLURM cluster (`slurm`), and where a run stands (`status`)."""
