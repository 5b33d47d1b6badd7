"""What people look at: a file's numbers, tables, the difference of two files. Reading needs none of it."""
