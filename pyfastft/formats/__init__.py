"""Files that other libraries read and write."""
