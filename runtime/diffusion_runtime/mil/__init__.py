"""ML Programs: read, checked, rewritten and run on any machine. Imports neither pipeline nor backends."""
