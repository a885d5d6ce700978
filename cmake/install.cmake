# make install: the libraries with find_package(heed) and pkg-config, the command with its man page and
# bash completion.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(HEED_CMAKE_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/heed)
set_target_properties(heed heed_model PROPERTIES VERSION ${PROJECT_VERSION} SOVERSION ${PROJECT_VERSION_MAJOR})

# Two export sets: who wants heed::heed alone need not have what heed::model depends on.
install(TARGETS heed EXPORT heed INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(TARGETS heed_model EXPORT heed_model INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
if(HEED_COMMAND)
  install(TARGETS heed_command)
  if(TARGET heed_torch_command)
    install(TARGETS heed_torch_command)
  endif()
endif()
install(EXPORT heed FILE heed-targets.cmake NAMESPACE heed:: DESTINATION ${HEED_CMAKE_DIR})
install(EXPORT heed_model FILE heed-model-targets.cmake NAMESPACE heed:: DESTINATION ${HEED_CMAKE_DIR})
install(DIRECTORY heed/ DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/heed FILES_MATCHING PATTERN "*.h" PATTERN isa EXCLUDE
  PATTERN nn EXCLUDE PATTERN torch EXCLUDE)

configure_package_config_file(cmake/heed-config.cmake.in ${PROJECT_BINARY_DIR}/heed-config.cmake
  INSTALL_DESTINATION ${HEED_CMAKE_DIR} NO_SET_AND_CHECK_MACRO)
write_basic_package_version_file(${PROJECT_BINARY_DIR}/heed-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/heed-config.cmake ${PROJECT_BINARY_DIR}/heed-config-version.cmake
  DESTINATION ${HEED_CMAKE_DIR})

# Relative to where heed.pc stands, so that an installed tree can be moved or staged.
file(RELATIVE_PATH HEED_PC_PREFIX ${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig ${CMAKE_INSTALL_PREFIX})
configure_file(heed.pc.in ${PROJECT_BINARY_DIR}/heed.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/heed.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)

install(FILES docs/heed.1 DESTINATION ${CMAKE_INSTALL_MANDIR}/man1)
install(FILES scripts/completion/heed.bash DESTINATION ${CMAKE_INSTALL_DATADIR}/bash-completion/completions RENAME heed)

# Other programs that `heed bench --against` times; the command finds them beside itself.
install(DIRECTORY scripts/peers/ DESTINATION ${CMAKE_INSTALL_DATADIR}/heed/peers FILES_MATCHING PATTERN "*.py")
