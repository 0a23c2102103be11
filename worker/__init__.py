"""The worker: claims jobs from SQL, runs each as a child process, tells what happens."""
