"""The whole system on real data: import, train, kill, resume, prove. Run by ``make demo``."""
