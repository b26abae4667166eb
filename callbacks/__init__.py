"""Lightning callbacks: each observes a run and answers one question; none changes its result."""
