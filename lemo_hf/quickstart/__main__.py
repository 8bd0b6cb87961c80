from .comparison import main

main()
