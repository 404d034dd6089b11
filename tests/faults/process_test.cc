int unused_process_test;
