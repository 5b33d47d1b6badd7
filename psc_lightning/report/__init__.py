"""What people look at: a file's numbers, tables, the difference of two files, plots of a run. Reading needs none of it."""
