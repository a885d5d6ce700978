# cmake -D HOW=install|find_package|pkg_config -D BUILD=… -D STAGING=… -D COMPILER=… -D FLAGS=… -P run.cmake
# Installs heed into a folder of its own, and builds and runs a program against it.
function(run)
  execute_process(COMMAND ${ARGV} COMMAND_ECHO STDOUT COMMAND_ERROR_IS_FATAL ANY)
endfunction()

set(work ${BUILD}/outside-${HOW})
file(REMOVE_RECURSE ${work})
file(MAKE_DIRECTORY ${work})

if(HOW STREQUAL "install")
  file(REMOVE_RECURSE ${STAGING})
  run(${CMAKE_COMMAND} --install ${BUILD} --prefix ${STAGING})
  foreach(file bin/heed share/man/man1/heed.1 share/bash-completion/completions/heed
          share/heed/peers/peer.py include/heed/mechanism/attend.h)
    if(NOT EXISTS ${STAGING}/${file})
      message(FATAL_ERROR "${file} was not installed")
    endif()
  endforeach()
  run(${STAGING}/bin/heed --version)

elseif(HOW STREQUAL "find_package")
  run(${CMAKE_COMMAND} -S ${CMAKE_CURRENT_LIST_DIR} -B ${work} -DCMAKE_BUILD_TYPE=Release -DCMAKE_PREFIX_PATH=${STAGING}
      -DCMAKE_FIND_USE_PACKAGE_REGISTRY=OFF -DCMAKE_CXX_COMPILER=${COMPILER} -DCMAKE_CXX_FLAGS=${FLAGS} -DWITH_MODEL=ON)
  run(${CMAKE_COMMAND} --build ${work})
  run(${work}/outside)
  run(${work}/with_model)

else()
  file(GLOB_RECURSE found ${STAGING}/heed.pc)
  cmake_path(GET found PARENT_PATH folder)
  set(ENV{PKG_CONFIG_PATH} ${folder})
  execute_process(COMMAND pkg-config --cflags --libs heed OUTPUT_VARIABLE flags OUTPUT_STRIP_TRAILING_WHITESPACE
                  COMMAND_ERROR_IS_FATAL ANY)
  separate_arguments(flags UNIX_COMMAND "${flags}")
  separate_arguments(FLAGS UNIX_COMMAND "${FLAGS}")
  run(${COMPILER} -std=c++20 -O1 ${CMAKE_CURRENT_LIST_DIR}/main.cpp -o ${work}/outside ${FLAGS} ${flags})
  run(${work}/outside)
endif()
